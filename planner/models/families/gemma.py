"""Gemma: scaled embeddings, wide heads, a tied head; the text model of PaliGemma."""

from __future__ import annotations

from dataclasses import replace

from planner.models.causal import CausalLM
from planner.models.decoder import DecoderGeometry, Defaults
from planner.models.reading import Reader


class Gemma(CausalLM):
    model_type = "gemma"
    defaults = Defaults(
        vocab_size=256_000, hidden_size=3072, intermediate_size=24_576, num_hidden_layers=28,
        num_attention_heads=16, num_key_value_heads=16, max_position_embeddings=8192,
        rms_norm_eps=1e-6, head_dim=256, tie_word_embeddings=True,
        hidden_act="gelu_pytorch_tanh",
    )  # fmt: skip

    def refine(self, reader: Reader, read: DecoderGeometry) -> DecoderGeometry:
        bias = reader.flag("attention_bias", False)
        return replace(
            read,
            norm="gemma_rms",
            embedding_scale=True,
            qkv_bias=bias,
            output_bias=bias,
            bidirectional=reader.flag("use_bidirectional_attention", False),
        )


FAMILY = Gemma()
