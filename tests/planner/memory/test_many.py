"""The vectorised run equals full runs, to the byte, on every pair."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from planner.memory.many import run_many
from planner.memory.program import run
from planner.models.registry import load_model
from planner.spec import spec_from_mapping

PAIRS = [(1, 1024), (4, 768), (8, 4096), (1, 640)]
SPECS: list[dict[str, Any]] = [
    {},
    {"gradient_checkpointing": True, "gradient_accumulation_steps": 4},
    {"lora": {"target_modules": ["lm_head"]}, "optimizer": "adamw_torch"},
    {"method": "full", "quantization": "none", "optimizer": "adamw_8bit"},
    {"quantization": "int8", "gradient_checkpointing": True},
    {"quantization": "none", "attention": "eager"},
    {"model": "google/gemma-2-2b"},
    {"model": "Qwen/Qwen3-4B", "precision": "fp16"},
    {"model": "lavin-7b"},
    {"model": "lavin-7b", "images_per_sample": 1, "gradient_checkpointing": True},
    {"model": "lavin-7b", "images_per_sample": 1, "quantization": "none", "attention": "eager"},
    {"model": "llama-7b", "adapter": "adaption_prompt"},
]


@pytest.mark.parametrize("values", SPECS, ids=str)
def test_many_equals_one_run_a_pair(values: dict[str, Any]) -> None:
    spec = spec_from_mapping({"model": "facebook/chameleon-7b", **values})
    model = load_model(spec.model)
    batches, lengths = (np.array(sizes) for sizes in zip(*PAIRS, strict=True))
    many = run_many(spec, model, batches, lengths)
    flops = np.broadcast_to(many.work.micro_batch.flops_16bit, batches.shape)
    for index, (batch, length) in enumerate(PAIRS):
        sized = {"micro_batch_size": batch, "sequence_length": length}
        one = run(spec.model_copy(update=sized), model)
        assert many.peak_bytes[index] == one.peak.peak_bytes
        assert many.static_bytes == one.static_bytes
        assert flops[index] == one.work.micro_batch.flops_16bit
