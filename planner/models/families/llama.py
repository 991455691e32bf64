"""LLaMA 1, 2 and 3: grouped-query attention where config.json says so; 3.2 ties its head."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from planner.models.decoder import DecoderGeometry, Defaults, causal_modules, read_decoder
from planner.models.decoder_step import causal_forward
from planner.models.images import no_images
from planner.models.reading import Reader

MODEL_TYPES = ("llama",)
AUTO_CLASS = "AutoModelForCausalLM"
DEFAULTS = Defaults(
    vocab_size=32_000,
    hidden_size=4096,
    intermediate_size=11_008,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=None,
    max_position_embeddings=2048,
    rms_norm_eps=1e-6,
)


def decoder(reader: Reader, nested: bool = False) -> DecoderGeometry:
    """Read the keys of a llama decoder; `nested` in a larger config, sizes may be left out."""
    read = read_decoder(reader, "llama", DEFAULTS, nested)
    bias = reader.flag("attention_bias", False)
    return replace(read, qkv_bias=bias, output_bias=bias, mlp_bias=reader.flag("mlp_bias", False))


def geometry(config: Mapping[str, Any]) -> DecoderGeometry:
    """The geometry that config.json describes; InputError names every bad key."""
    reader = Reader(config)
    read = decoder(reader)
    reader.check()
    return read


modules = causal_modules
forward = causal_forward
image_tokens = image_features = no_images
