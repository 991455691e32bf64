"""Qwen2 and Qwen2.5: biases on queries, keys and values; small ones tie their head."""

from __future__ import annotations

from dataclasses import replace

from planner.models.causal import CausalLM
from planner.models.decoder import DecoderGeometry, Defaults, late_windows
from planner.models.reading import Reader


class Qwen2(CausalLM):
    model_type = "qwen2"
    defaults = Defaults(
        vocab_size=151_936, hidden_size=4096, intermediate_size=22_016, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=32, max_position_embeddings=32_768,
        rms_norm_eps=1e-6,
    )  # fmt: skip

    def refine(self, reader: Reader, read: DecoderGeometry) -> DecoderGeometry:
        return replace(late_windows(reader, read, 28), qkv_bias=True)


FAMILY = Qwen2()
