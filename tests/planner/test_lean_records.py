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
