"""Gemma 3, text: five sliding layers to one full, RMSNorm on queries and keys, no soft caps."""

from __future__ import annotations

from dataclasses import replace

from planner.models.decoder import FULL, SLIDING, DecoderGeometry, with_pattern
from planner.models.families.gemma import Gemma
from planner.models.reading import Reader


class Gemma3Text(Gemma):
    model_type = "gemma3_text"
    defaults = Gemma.defaults._replace(
        vocab_size=262_208, hidden_size=2304, intermediate_size=9216, num_hidden_layers=26,
        num_attention_heads=8, num_key_value_heads=4, max_position_embeddings=131_072,
        activation_key="hidden_activation",
    )  # fmt: skip

    def refine(self, reader: Reader, read: DecoderGeometry) -> DecoderGeometry:
        window = reader.optional_size("sliding_window", 4096)
        pattern = (*(SLIDING,) * (reader.size("sliding_window_pattern", 6, high=4096) - 1), FULL)
        return replace(
            with_pattern(reader, super().refine(reader, read), pattern, window),
            qk_norm="rms",
            sandwich_norms=True,
            rotary_by_layer_type=True,
            attention_scalar=reader.number("query_pre_attn_scalar", 256.0),
            final_logit_softcapping=reader.optional_number("final_logit_softcapping"),
        )


FAMILY = Gemma3Text()
