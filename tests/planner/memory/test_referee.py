"""The shadow program against the real modelling code: peaks of forward and backward, and all that
is allocated on the way, family by family."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.planner.memory.referee import (
    both,
    planned_allocated,
    planned_peaks,
    traced_allocated,
    traced_peaks,
)

TOLERANCE = 1e-3
FLOOR_BYTES = 1 << 20  # masks and positions are not the point
TEXT = {"micro_batch_size": 4, "sequence_length": 512, "double_quant": False}
WIDE = {"quantization": "none"}
CHECKPOINTED = {"gradient_checkpointing": True}
EAGER = {"attention": "eager"}
SINGLE = {"precision": "fp32", "weights_dtype": "float32"}
IMAGE = {"micro_batch_size": 2, "images_per_sample": 1, "double_quant": False}

LLAMA = "meta-llama/Llama-3.2-1B-Instruct"
GEMMA2, GEMMA3 = "google/gemma-2-2b", "google/gemma-3-1b-it"
CHAMELEON, LLAVA = "facebook/chameleon-7b", "llava-hf/llava-1.5-7b-hf"

# (model, spec fields, changes of the text config)
CASES: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    (LLAMA, TEXT, {}),
    (LLAMA, {**TEXT, **EAGER}, {}),
    (LLAMA, {**TEXT, **WIDE, **EAGER, **CHECKPOINTED}, {}),
    (LLAMA, {**TEXT, **WIDE, "attention": "flash_attention_2"}, {}),
    (LLAMA, {**TEXT, **WIDE, "method": "full"}, {}),
    (LLAMA, {**TEXT, **WIDE, **EAGER, "micro_batch_size": 1}, {}),
    ("Qwen/Qwen2.5-0.5B", {**TEXT, **CHECKPOINTED}, {}),
    ("Qwen/Qwen3-0.6B", {**TEXT, **WIDE, **EAGER}, {}),
    ("microsoft/Phi-4-mini-instruct", {**TEXT, **WIDE}, {}),
    ("mistralai/Mistral-7B-v0.1", {**TEXT, **WIDE}, {"sliding_window": 256}),
    ("google/gemma-2b", {**TEXT, **WIDE}, {}),
    (GEMMA2, {**TEXT, **WIDE, **EAGER}, {}),
    (GEMMA2, {**TEXT, **WIDE}, {"sliding_window": 256}),
    (GEMMA3, {**TEXT, **WIDE}, {}),
    (CHAMELEON, {**TEXT, **WIDE, **EAGER}, {}),
    (CHAMELEON, {**IMAGE, "sequence_length": 1536}, {}),
    (CHAMELEON, {**IMAGE, **WIDE, "method": "full", "sequence_length": 1536}, {}),
    (LLAVA, {**IMAGE, "sequence_length": 1024}, {}),
    (LLAVA, {**IMAGE, **WIDE, **CHECKPOINTED, "sequence_length": 1024}, {}),
    (LLAVA, {**TEXT, **WIDE}, {}),
    ("llava-hf/llava-v1.6-mistral-7b-hf", {**TEXT, **WIDE}, {}),
    ("google/paligemma-3b-pt-224", {**IMAGE, **WIDE, "sequence_length": 768}, {}),
    ("google/gemma-3-4b-it", {**IMAGE, **CHECKPOINTED, "sequence_length": 768}, {}),
    ("Qwen/Qwen2-VL-2B-Instruct", {**IMAGE, "micro_batch_size": 1, "image_size": 448,
                                   "sequence_length": 1024}, {}),
    ("Qwen/Qwen2.5-VL-3B-Instruct", {**IMAGE, **WIDE, "image_size": 448, "sequence_length": 768},
     {}),
    # Found by drawing every field at random:
    (LLAMA, {**TEXT, **WIDE, "lora": {"target_modules": ["embed_tokens", "o_proj"]}}, {}),
    (GEMMA2, {**TEXT, "lora": {"rank": 64, "target_modules": ["embed_tokens", "q_proj"]}}, {}),
    (CHAMELEON, {**IMAGE, "sequence_length": 1536, "gradient_accumulation_steps": 4}, {}),
    ("mistralai/Mistral-7B-v0.1", {**TEXT, "precision": "fp16"}, {}),  # bf16 weights, fp16 products
    (LLAVA, {**IMAGE, **WIDE, "method": "full", "weights_dtype": "float32",
             "sequence_length": 1024}, {}),
]  # fmt: skip


# On meta tensors these make temporaries that the card's kernels do not: the peaks are compared.
PEAKS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    (LLAMA, {**TEXT, **WIDE, **SINGLE}, {}),  # grouped heads in fp32: torch's own products
    ("Qwen/Qwen2.5-VL-3B-Instruct", {**IMAGE, **WIDE, **EAGER, "image_size": 336,
                                     "sequence_length": 512}, {}),
]  # fmt: skip


def _name(case: tuple[str, dict[str, Any], dict[str, Any]]) -> str:
    name, fields, changes = case
    told = {**{k: v for k, v in fields.items() if TEXT.get(k) != v}, **changes}
    return "-".join([name.partition("/")[2], *(f"{k}={v}" for k, v in told.items())])


@pytest.mark.parametrize("case", PEAKS, ids=_name)
def test_peaks_are_those_of_the_real_code(
    case: tuple[str, dict[str, Any], dict[str, Any]], tmp_path: Path
) -> None:
    traced, planned = both(tmp_path, *case)
    assert planned_peaks(planned) == pytest.approx(traced_peaks(traced), rel=TOLERANCE)


@pytest.mark.parametrize("case", CASES, ids=_name)
def test_peaks_and_allocations_are_those_of_the_real_code(
    case: tuple[str, dict[str, Any], dict[str, Any]], tmp_path: Path
) -> None:
    name, fields, changes = case
    traced, planned = both(tmp_path, name, fields, changes)
    expected, found = traced_peaks(traced), planned_peaks(planned)
    assert found["forward"] == pytest.approx(expected["forward"], rel=TOLERANCE)
    assert found["backward"] == pytest.approx(expected["backward"], rel=TOLERANCE)
    assert planned.resident_bytes == pytest.approx(traced.resident_bytes, rel=TOLERANCE)
    all_traced = traced_allocated(traced, FLOOR_BYTES)
    assert planned_allocated(planned, FLOOR_BYTES) == pytest.approx(all_traced, rel=TOLERANCE)
