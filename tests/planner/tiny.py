"""A small model for tests that ask many questions: two layers of LLaMA, as a config.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from planner.spec import RunSpec, spec_from_mapping

CONFIG = {
    "model_type": "llama", "vocab_size": 512, "hidden_size": 256, "intermediate_size": 704,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
}  # fmt: skip


def tiny_model(folder: Path, **changes: Any) -> str:
    """Write the config into `folder`; its path is a model's name."""
    path = folder / "config.json"
    path.write_text(json.dumps({**CONFIG, **changes}), encoding="utf-8")
    return str(folder)


def tiny_spec(model: str, **fields: Any) -> RunSpec:
    """A spec of the tiny model on an RTX 3090."""
    return spec_from_mapping({"model": model, "device": "rtx-3090", **fields})
