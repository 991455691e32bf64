"""Phi-3, Phi-3.5 and Phi-4: one projection for queries, keys and values, one for gate and up."""

from __future__ import annotations

from dataclasses import replace

from planner.models.causal import CausalLM
from planner.models.decoder import FULL, SLIDING, DecoderGeometry, Defaults, with_windows
from planner.models.reading import Reader


class Phi3(CausalLM):
    model_type = "phi3"
    defaults = Defaults(
        vocab_size=32_064, hidden_size=3072, intermediate_size=8192, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=None, max_position_embeddings=4096,
        rms_norm_eps=1e-5,
    )  # fmt: skip

    def refine(self, reader: Reader, read: DecoderGeometry) -> DecoderGeometry:
        window = reader.optional_size("sliding_window")
        return replace(
            with_windows(read, SLIDING if window else FULL, window),
            fused_projections=True,
            resid_pdrop=reader.number("resid_pdrop", 0.0, high=1.0),
            embd_pdrop=reader.number("embd_pdrop", 0.0, high=1.0),
            partial_rotary_factor=reader.number("partial_rotary_factor", 1.0, high=1.0),
        )


FAMILY = Phi3()
