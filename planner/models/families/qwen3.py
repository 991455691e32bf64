"""Qwen3: RMSNorm on queries and keys, a head dimension of its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from planner.models.decoder import (
    DecoderGeometry,
    Defaults,
    causal_modules,
    late_windows,
    read_decoder,
)
from planner.models.decoder_step import causal_forward
from planner.models.images import no_images
from planner.models.reading import Reader

MODEL_TYPES = ("qwen3",)
AUTO_CLASS = "AutoModelForCausalLM"
DEFAULTS = Defaults(
    vocab_size=151_936,
    hidden_size=4096,
    intermediate_size=22_016,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=32,
    max_position_embeddings=32_768,
    rms_norm_eps=1e-6,
    head_dim=128,
)


def decoder(reader: Reader, nested: bool = False) -> DecoderGeometry:
    """Read the keys of a qwen3 decoder; `nested` in a larger config, sizes may be left out."""
    read = read_decoder(reader, "qwen3", DEFAULTS, nested)
    bias = reader.flag("attention_bias", False)
    read = late_windows(reader, read, 28)
    return replace(read, qk_norm="rms", qkv_bias=bias, output_bias=bias)


def geometry(config: Mapping[str, Any]) -> DecoderGeometry:
    """The geometry that config.json describes; InputError names every bad key."""
    reader = Reader(config)
    read = decoder(reader)
    reader.check()
    return read


modules = causal_modules
forward = causal_forward
image_tokens = image_features = no_images
