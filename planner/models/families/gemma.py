"""Gemma: scaled embeddings, wide heads, a tied head; the text model of PaliGemma."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from planner.models.decoder import DecoderGeometry, Defaults, causal_modules, read_decoder
from planner.models.decoder_step import causal_forward
from planner.models.images import no_images
from planner.models.reading import Reader

MODEL_TYPES = ("gemma",)
AUTO_CLASS = "AutoModelForCausalLM"
DEFAULTS = Defaults(
    vocab_size=256_000,
    hidden_size=3072,
    intermediate_size=24_576,
    num_hidden_layers=28,
    num_attention_heads=16,
    num_key_value_heads=16,
    max_position_embeddings=8192,
    rms_norm_eps=1e-6,
    head_dim=256,
    tie_word_embeddings=True,
    hidden_act="gelu_pytorch_tanh",
)


def decoder(reader: Reader, nested: bool = False) -> DecoderGeometry:
    """Read the keys of a gemma decoder; `nested` in a larger config, sizes may be left out."""
    read = read_decoder(reader, "gemma", DEFAULTS, nested)
    bias = reader.flag("attention_bias", False)
    return replace(
        read,
        norm="gemma_rms",
        embedding_scale=True,
        qkv_bias=bias,
        output_bias=bias,
        bidirectional=reader.flag("use_bidirectional_attention", False),
    )


def geometry(config: Mapping[str, Any]) -> DecoderGeometry:
    """The geometry that config.json describes; InputError names every bad key."""
    reader = Reader(config)
    read = decoder(reader)
    reader.check()
    return read


modules = causal_modules
forward = causal_forward
image_tokens = image_features = no_images
