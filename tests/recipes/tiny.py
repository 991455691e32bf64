"""Tiny models of the real families, for tests on a CPU."""

from __future__ import annotations

from typing import Any

from transformers import ChameleonConfig, LlamaConfig, PretrainedConfig, Qwen3Config

from planner.spec import RunSpec, spec_from_mapping
from recipes.models import chameleon_vocabulary_map

IMAGE_CODES = 64
IMAGE_TOKENS = 16


def tiny_chameleon(**overrides: Any) -> PretrainedConfig:
    """2 layers of 64, 512 tokens of which 64 are image codes; a 32-pixel image is 16 tokens."""
    values: dict[str, Any] = {
        "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 128,
        "vocabulary_map": chameleon_vocabulary_map(IMAGE_CODES, 4, 100),
        "vq_config": {
            "num_embeddings": IMAGE_CODES, "embed_dim": 32, "latent_channels": 32,
            "resolution": 32, "base_channels": 32, "channel_multiplier": [1, 1, 1, 1],
            "num_res_blocks": 1,
        },
    }  # fmt: skip
    return ChameleonConfig(**{**values, **overrides})


def tiny_llama(**overrides: Any) -> PretrainedConfig:
    """2 layers of 64, grouped heads, 300 tokens."""
    values: dict[str, Any] = {
        "vocab_size": 300, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
    }  # fmt: skip
    return LlamaConfig(**{**values, **overrides})


def tiny_qwen3(**overrides: Any) -> PretrainedConfig:
    """The same with queries and keys normed by head, heads wider than their share, tied ends."""
    values: dict[str, Any] = {
        "vocab_size": 300, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
        "max_position_embeddings": 128, "tie_word_embeddings": True,
    }  # fmt: skip
    return Qwen3Config(**{**values, **overrides})


def tiny_spec(**overrides: Any) -> RunSpec:
    """A spec for the CPU in fp32; `overrides` as in a TOML file."""
    values: dict[str, Any] = {
        "model": "tiny", "quantization": "none", "weights_dtype": "float32", "precision": "fp32",
        "micro_batch_size": 2, "sequence_length": 24, "optimizer": "adamw_torch",
        "lora": {"rank": 4, "alpha": 8.0, "dropout": 0.0, "target_modules": "all-linear"},
    }  # fmt: skip
    return spec_from_mapping({**values, **overrides})
