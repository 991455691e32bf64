"""Mistral: LLaMA with grouped queries and, in v0.1, a sliding window on every layer."""

from __future__ import annotations

from collections.abc import Mapping
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

MODEL_TYPES = ("mistral",)
AUTO_CLASS = "AutoModelForCausalLM"
DEFAULTS = Defaults(
    vocab_size=32_000,
    hidden_size=4096,
    intermediate_size=14_336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    max_position_embeddings=131_072,
    rms_norm_eps=1e-6,
)


def decoder(reader: Reader, nested: bool = False) -> DecoderGeometry:
    """Read the keys of a mistral decoder; `nested` in a larger config, sizes may be left out."""
    read = read_decoder(reader, "mistral", DEFAULTS, nested)
    # A window of null is none at all; a missing key is the default.
    window = reader.optional_size("sliding_window") if reader.states("sliding_window") else 4096
    return with_windows(read, SLIDING if window else FULL, window)


def geometry(config: Mapping[str, Any]) -> DecoderGeometry:
    """The geometry that config.json describes; InputError names every bad key."""
    reader = Reader(config)
    read = decoder(reader)
    reader.check()
    return read


modules = causal_modules
forward = causal_forward
image_tokens = image_features = no_images
