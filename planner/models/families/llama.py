"""LLaMA 1, 2 and 3: grouped-query attention where config.json says so; 3.2 ties its head."""

from __future__ import annotations

from dataclasses import replace

from planner.models.causal import CausalLM
from planner.models.decoder import DecoderGeometry, Defaults
from planner.models.reading import Reader


class Llama(CausalLM):
    model_type = "llama"
    defaults = Defaults(
        vocab_size=32_000, hidden_size=4096, intermediate_size=11_008, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=None, max_position_embeddings=2048,
        rms_norm_eps=1e-6,
    )  # fmt: skip

    def refine(self, reader: Reader, read: DecoderGeometry) -> DecoderGeometry:
        bias = reader.flag("attention_bias", False)
        mlp_bias = reader.flag("mlp_bias", False)
        return replace(read, qkv_bias=bias, output_bias=bias, mlp_bias=mlp_bias)


FAMILY = Llama()
