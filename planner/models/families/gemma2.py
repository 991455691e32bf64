"""Gemma 2: Gemma with four norms a layer, soft caps, every other layer with a sliding window."""

from __future__ import annotations

from dataclasses import replace

from planner.models.decoder import FULL, SLIDING, DecoderGeometry, with_pattern
from planner.models.families.gemma import Gemma
from planner.models.reading import Reader


class Gemma2(Gemma):
    model_type = "gemma2"
    defaults = Gemma.defaults._replace(
        hidden_size=2304, intermediate_size=9216, num_hidden_layers=26, num_attention_heads=8,
        num_key_value_heads=4, activation_key="hidden_activation",
    )  # fmt: skip

    def refine(self, reader: Reader, read: DecoderGeometry) -> DecoderGeometry:
        window = reader.optional_size("sliding_window", 4096)
        return replace(
            with_pattern(reader, super().refine(reader, read), (SLIDING, FULL), window),
            sandwich_norms=True,
            attention_scalar=reader.number("query_pre_attn_scalar", 256.0),
            attn_logit_softcapping=reader.optional_number("attn_logit_softcapping", 50.0),
            final_logit_softcapping=reader.optional_number("final_logit_softcapping", 30.0),
        )


FAMILY = Gemma2()
