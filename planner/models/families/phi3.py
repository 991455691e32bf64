"""Phi-3, Phi-3.5 and Phi-4: one projection for queries, keys and values, one for gate and up."""

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
    with_windows,
)
from planner.models.decoder_step import causal_forward
from planner.models.images import no_images
from planner.models.reading import Reader

MODEL_TYPES = ("phi3",)
AUTO_CLASS = "AutoModelForCausalLM"
DEFAULTS = Defaults(
    vocab_size=32_064,
    hidden_size=3072,
    intermediate_size=8192,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=None,
    max_position_embeddings=4096,
    rms_norm_eps=1e-5,
)


def decoder(reader: Reader, nested: bool = False) -> DecoderGeometry:
    """Read the keys of a phi3 decoder; `nested` in a larger config, sizes may be left out."""
    read = read_decoder(reader, "phi3", DEFAULTS, nested)
    window = reader.optional_size("sliding_window")
    read = with_windows(read, SLIDING if window else FULL, window)
    return replace(
        read,
        fused_projections=True,
        resid_pdrop=reader.number("resid_pdrop", 0.0, high=1.0),
        embd_pdrop=reader.number("embd_pdrop", 0.0, high=1.0),
        partial_rotary_factor=reader.number("partial_rotary_factor", 1.0, high=1.0),
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
