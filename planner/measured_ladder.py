"""Rows that `python -m recipes.lavin.measure --json` left, found again by a spec's settings."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from planner.errors import InputError, Problem, VramwiseError
from planner.models.registry import load_model
from planner.spec import RunSpec

RESULTS = Path(__file__).resolve().parent.parent / "results"
_SETTINGS = (
    "quantization", "precision", "micro_batch_size", "sequence_length", "images_per_sample",
    "gradient_checkpointing", "optimizer", "attention", "expandable_segments",
)  # fmt: skip
# Switches of the recipe that a spec does not have, at their defaults.
_DEFAULTS = {"routing": "outputs", "published_batch": False, "cap_bytes": None}


class Measured(NamedTuple):
    """One measured run. required_bytes: the smallest cap that was seen to work (None where none was
    looked for); outside_bytes: the driver's, beside torch's reserved."""

    device: str
    outcome: str
    allocated_bytes: int | None
    reserved_bytes: int | None
    required_bytes: int | None
    outside_bytes: int | None
    step_s: float | None

    @property
    def ran_out(self) -> bool:
        return self.outcome != "ok"


def ladder_rows(source: str | Path | None = None) -> list[dict[str, Any]]:
    """Every row of a JSON-lines file, or of all in a folder (default: results/ladder of the
    checkout, nothing where there is none). Raises InputError for a line that is no JSON object."""
    path = Path(source) if source is not None else RESULTS / "ladder"
    if source is not None and not path.exists():
        raise InputError(Problem("--measured", "no such file or folder", str(source)))
    files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path] if path.is_file() else []
    return [row for file in files for row in _rows(file)]


def _rows(file: Path) -> Iterable[dict[str, Any]]:
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            row = None
        if not isinstance(row, dict):
            raise InputError(Problem("--measured", f"line {number} is no JSON object", file.name))
        yield row


def find_measured(spec: RunSpec, rows: Iterable[Mapping[str, Any]]) -> Measured | None:
    """The row of the spec's own settings; among several, the last that looked for the smallest cap,
    with the median of their seconds. Any accumulation is as two micro batches are: the second meets
    the first's gradients."""
    found = [row for row in rows if _is_of(row, spec)]
    if not found:
        return None
    bisected = [row for row in found if row.get("allocator_required_bytes")]
    row = (bisected or found)[-1]
    seconds = [
        other["step_seconds"]
        for other in found
        if other.get("step_seconds") and _accumulation(other) == _accumulation(row)
    ]
    return Measured(
        str(row.get("device", "")), str(row.get("outcome", "ok")), row.get("peak_allocated_bytes"),
        row.get("peak_reserved_bytes"), row.get("allocator_required_bytes"),
        row.get("non_torch_bytes") or None, median(seconds) if seconds else None,
    )  # fmt: skip


def _accumulation(row: Mapping[str, Any]) -> int:
    return int(row.get("gradient_accumulation_steps", 1))


def _is_of(row: Mapping[str, Any], spec: RunSpec) -> bool:
    if any(row.get(name, default) != default for name, default in _DEFAULTS.items()):
        return False
    if (_accumulation(row) > 1) != (spec.gradient_accumulation_steps > 1):
        return False
    if any(name in row and row[name] != getattr(spec, name) for name in _SETTINGS):
        return False
    return _model_id(str(row.get("model", ""))) == load_model(spec.model).id


def _model_id(name: str) -> str | None:
    try:
        return load_model(name).id
    except VramwiseError:
        return None
