"""Tiny configs for the dry probe: every rule in play, well under a second each."""

from __future__ import annotations

from typing import Any

import pytest
import transformers

from planner.spec import RunSpec, spec_from_mapping

SHAPE = {"num_hidden_layers": 2, "hidden_size": 512, "intermediate_size": 1024,
         "num_attention_heads": 8, "num_key_value_heads": 8, "vocab_size": 4096}  # fmt: skip


def make_spec(**values: Any) -> RunSpec:
    base = {"model": "tiny", "sequence_length": 256, "micro_batch_size": 2}
    return spec_from_mapping({**base, **values})


@pytest.fixture
def llama() -> transformers.LlamaConfig:
    return transformers.LlamaConfig(**SHAPE)
