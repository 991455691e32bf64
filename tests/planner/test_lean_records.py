"""The lean stack's formulas against the lean steps measured on an H200 (results/records)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from planner.memory.program import run
from planner.memory.requirement import reserve
from planner.models.registry import load_model
from planner.spec import spec_from_mapping
from planner.units import MIB

RECORDS = Path(__file__).parents[2] / "results/records/nvidia-h200/lean.jsonl"
ROWS = [json.loads(line) for line in RECORDS.read_text(encoding="utf-8").splitlines()]


def _name(row: dict[str, Any]) -> str:
    spec = row["spec"]
    kind = "checkpointed" if spec["gradient_checkpointing"] else "plain"
    shape = f"{spec['micro_batch_size']}x{spec['sequence_length']}"
    return f"{spec['model'].rpartition('/')[2]}-{spec['quantization']}-{shape}-{kind}"


def test_there_are_records() -> None:
    assert len(ROWS) >= 12


@pytest.mark.parametrize("row", ROWS, ids=_name)
def test_lean_bytes_are_those_measured(row: dict[str, Any]) -> None:
    spec, meters = spec_from_mapping(row["spec"]), row["meters"]
    found = reserve(run(spec, load_model(spec.model)), 32 * MIB, expandable_segments=True)
    assert found.resident_bytes == pytest.approx(meters["resident_bytes"], rel=1e-3)
    assert found.peak_allocated_bytes == pytest.approx(meters["peak_allocated_bytes"], rel=0.01)
    capacity = meters["capacity"]
    low = capacity.get("failed_cap_bytes") or meters["peak_allocated_bytes"]
    assert low * 0.97 <= found.required_bytes <= capacity["passed_cap_bytes"] * 1.03


@pytest.mark.parametrize(
    "model",
    ["google/gemma-2-2b", "microsoft/Phi-3-mini-4k-instruct", "facebook/chameleon-30b",
     "Qwen/Qwen3-8B", "google/gemma-3-4b-it", "mistralai/Mistral-7B-v0.3"],
)  # fmt: skip
@pytest.mark.parametrize("checkpointing", [False, True])
def test_other_families_take_less_than_the_stock_stack(model: str, checkpointing: bool) -> None:
    """Not measured: fused projections, norms on both sides, norms after the linears."""
    fields = {"model": model, "gradient_checkpointing": checkpointing, "micro_batch_size": 2}
    peaks = {}
    for stack in ("stock", "lean"):
        spec = spec_from_mapping({**fields, "stack": stack})
        peaks[stack] = run(spec, load_model(model)).peak.peak_bytes
    assert 0 < peaks["lean"] < peaks["stock"]
