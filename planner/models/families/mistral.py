"""Mistral: LLaMA with grouped queries and, in v0.1, a sliding window on every layer."""

from __future__ import annotations

from planner.models.causal import CausalLM
from planner.models.decoder import FULL, SLIDING, DecoderGeometry, Defaults, with_windows
from planner.models.reading import Reader


class Mistral(CausalLM):
    model_type = "mistral"
    defaults = Defaults(
        vocab_size=32_000, hidden_size=4096, intermediate_size=14_336, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=131_072,
        rms_norm_eps=1e-6,
    )  # fmt: skip

    def refine(self, reader: Reader, read: DecoderGeometry) -> DecoderGeometry:
        # A window of null is none at all; a missing key is the default.
        stated = reader.states("sliding_window")
        window = reader.optional_size("sliding_window") if stated else 4096
        return with_windows(read, SLIDING if window else FULL, window)


FAMILY = Mistral()
