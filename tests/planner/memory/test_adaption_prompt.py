"""LLaMA-Adapter: parameters against peft's on the meta device, memory against its traced step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model

from planner.errors import InputError, UnsupportedError
from planner.estimate import estimate
from planner.models.registry import load_model
from planner.spec import spec_from_mapping
from recipes.build import adapter_config
from tests.planner.memory.referee import (
    both,
    planned_allocated,
    planned_peaks,
    traced_allocated,
    traced_peaks,
)
from tests.planner.models.conftest import meta_model

TOLERANCE = 1e-3
FLOOR_BYTES = 1 << 20
PROMPT = {"adapter": "adaption_prompt"}
LLAMA, MISTRAL = "huggyllama/llama-7b", "mistralai/Mistral-7B-v0.1"

CASES: list[tuple[str, dict[str, Any]]] = [
    (LLAMA, {"quantization": "none", "layers": 2}),
    (LLAMA, {"quantization": "none", "layers": 1, "attention": "eager", "micro_batch_size": 2}),
    (LLAMA, {"double_quant": False, "layers": 2}),
    (LLAMA, {"double_quant": False, "layers": 2, "gradient_checkpointing": True}),
    (MISTRAL, {"quantization": "none", "layers": 2, "micro_batch_size": 4}),
]


@pytest.mark.parametrize("model", [LLAMA, "huggyllama/llama-13b", MISTRAL])
def test_trains_what_peft_trains(model: str) -> None:
    spec = spec_from_mapping({"model": model, "device": "a100-40gb", **PROMPT})
    with torch.device("meta"):
        adapted = get_peft_model(meta_model(load_model(model)), adapter_config(spec))
    meta_model.cache_clear()  # peft changed it
    expected = adapted.get_nb_trainable_parameters()[0]
    assert estimate(spec).parameters.trainable == expected


def test_published_size() -> None:
    """Ten prompts in the last 30 layers of LLaMA-7B: the paper's 1.2M (arXiv 2303.16199)."""
    spec = spec_from_mapping({"model": LLAMA, "device": "a100-40gb", **PROMPT})
    assert estimate(spec).parameters.trainable == 30 * (10 * 4096 + 1)


@pytest.mark.parametrize(("model", "fields"), CASES, ids=str)
def test_peaks_and_allocations_are_those_of_peft(
    model: str, fields: dict[str, Any], tmp_path: Path
) -> None:
    rest = {"sequence_length": 512, **fields}
    layers = {"adaption_prompt": {"adapter_layers": rest.pop("layers")}}
    traced, planned = both(tmp_path, model, {**PROMPT, **layers, **rest})
    assert planned.resident_bytes == pytest.approx(traced.resident_bytes, rel=TOLERANCE)
    expected, found = traced_peaks(traced), planned_peaks(planned)
    assert found["forward"] == pytest.approx(expected["forward"], rel=TOLERANCE)
    assert found["backward"] == pytest.approx(expected["backward"], rel=TOLERANCE)
    all_traced = traced_allocated(traced, FLOOR_BYTES)
    assert planned_allocated(planned, FLOOR_BYTES) == pytest.approx(all_traced, rel=TOLERANCE)


def test_what_peft_refuses_is_refused() -> None:
    fields = {"device": "a100-40gb", **PROMPT}
    with pytest.raises(UnsupportedError, match="adapter"):
        estimate(spec_from_mapping({"model": "Qwen/Qwen2-0.5B", **fields}))
    with pytest.raises(UnsupportedError, match="lean"):
        estimate(spec_from_mapping({"model": LLAMA, "stack": "lean", **fields}))
    short = {"model": "meta-llama/Llama-3.2-1B-Instruct", **fields}
    with pytest.raises(InputError, match="adapter_layers"):
        estimate(spec_from_mapping(short))
