"""Gemma 3, text: five sliding layers to one full, RMSNorm on queries and keys, no soft caps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from planner.models.decoder import (
    FULL,
    SLIDING,
    DecoderGeometry,
    Defaults,
    causal_modules,
    read_decoder,
    with_pattern,
)
from planner.models.decoder_step import causal_forward
from planner.models.images import no_images
from planner.models.reading import Reader

MODEL_TYPES = ("gemma3_text",)
AUTO_CLASS = "AutoModelForCausalLM"
DEFAULTS = Defaults(
    vocab_size=262_208,
    hidden_size=2304,
    intermediate_size=9216,
    num_hidden_layers=26,
    num_attention_heads=8,
    num_key_value_heads=4,
    max_position_embeddings=131_072,
    rms_norm_eps=1e-6,
    head_dim=256,
    tie_word_embeddings=True,
    hidden_act="gelu_pytorch_tanh",
    activation_key="hidden_activation",
)


def decoder(reader: Reader, nested: bool = False) -> DecoderGeometry:
    """Read the keys of a Gemma 3 decoder; `nested` in a larger config, sizes may be left out."""
    read = read_decoder(reader, "gemma3_text", DEFAULTS, nested)
    bias = reader.flag("attention_bias", False)
    period = reader.size("sliding_window_pattern", 6, high=4096)
    pattern = (*(SLIDING,) * (period - 1), FULL)
    read = with_pattern(reader, read, pattern, reader.optional_size("sliding_window", 4096))
    return replace(
        read,
        norm="gemma_rms",
        qk_norm="rms",
        sandwich_norms=True,
        rotary_by_layer_type=True,
        embedding_scale=True,
        qkv_bias=bias,
        output_bias=bias,
        attention_scalar=reader.number("query_pre_attn_scalar", 256.0),
        final_logit_softcapping=reader.optional_number("final_logit_softcapping"),
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
