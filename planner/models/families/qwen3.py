"""Qwen3: RMSNorm on queries and keys, a head dimension of its own."""

from __future__ import annotations

from dataclasses import replace

from planner.models.causal import CausalLM
from planner.models.decoder import DecoderGeometry, Defaults, late_windows
from planner.models.reading import Reader


class Qwen3(CausalLM):
    model_type = "qwen3"
    defaults = Defaults(
        vocab_size=151_936, hidden_size=4096, intermediate_size=22_016, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=32, max_position_embeddings=32_768,
        rms_norm_eps=1e-6, head_dim=128,
    )  # fmt: skip

    def refine(self, reader: Reader, read: DecoderGeometry) -> DecoderGeometry:
        bias = reader.flag("attention_bias", False)
        read = late_windows(reader, read, 28)
        return replace(read, qk_norm="rms", qkv_bias=bias, output_bias=bias)


FAMILY = Qwen3()
