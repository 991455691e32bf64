"""Predictions beside measurements: a residual for every record, and whether it was held out.

A third of the records is held out by the hash of their key: nothing is fitted to it, and errors are
reported on it. A requirement's error is its distance to the measured bracket (failed, passed].
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from planner.answer import Estimate
from planner.errors import InputError, Problem, VramwiseError
from planner.estimate import estimate
from planner.spec import RunSpec, spec_from_mapping


@dataclass(frozen=True, slots=True)
class Measured:
    """One record's figures, in bytes and seconds; `failed_cap_bytes` None where nothing failed."""

    key: str
    spec: RunSpec
    resident_bytes: int
    peak_allocated_bytes: int
    peak_reserved_bytes: int
    failed_cap_bytes: int | None
    passed_cap_bytes: int | None
    non_torch_bytes: int
    step_s: float
    fresh: bool = True  # the first shape of its process: segments lie as in a user's run

    @property
    def held_out(self) -> bool:
        """By hash, so that a record never changes sides."""
        return int(hashlib.sha256(self.key.encode()).hexdigest(), 16) % 3 == 0


@dataclass(frozen=True, slots=True)
class Residual:
    """Relative errors, predicted over measured less one; None where not measured."""

    measured: Measured
    predicted: Estimate
    resident: float
    peak_allocated: float
    required: float | None
    step: float


def read_measured(paths: Iterable[Path]) -> Iterator[Measured]:
    """Completed records of .jsonl files or folders of them, the last of each key.

    A capacity that was searched by fresh processes stands before the record's own, see
    `fresh_capacities`. Raises InputError where a path holds no record.
    """
    latest: dict[str, Measured] = {}
    for path in paths:
        fresh = fresh_capacities(path)
        files = sorted(path.rglob("*.jsonl")) if path.is_dir() else [path]
        if not files or not all(file.is_file() for file in files):
            raise InputError(Problem("records", "no .jsonl file", str(path)))
        for file in files:
            for line in file.read_text(encoding="utf-8").splitlines():
                measured = _measured(line)
                if measured is not None:
                    failed, passed = fresh.get(
                        measured.key, (measured.failed_cap_bytes, measured.passed_cap_bytes)
                    )
                    latest[measured.key] = replace(
                        measured, failed_cap_bytes=failed, passed_cap_bytes=passed
                    )
    yield from latest.values()


def fresh_capacities(records: Path) -> dict[str, tuple[int | None, int]]:
    """key -> (failed, passed] cap in bytes, of `python -m probes.fresh_capacity`: the files of the
    folder `capacities` beside a folder of records."""
    found = {}
    for file in sorted((records.parent / "capacities").glob("*.jsonl")):
        for line in file.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            if row["passed_cap_bytes"] is not None:
                found[row["key"]] = (row["failed_cap_bytes"], row["passed_cap_bytes"])
    return found


def _measured(line: str) -> Measured | None:
    """None for a torn line, another schema, or an outcome that measured nothing."""
    try:
        record = json.loads(line)
    except json.JSONDecodeError:
        return None
    if record.get("schema_version") != 1 or record.get("outcome") != "ok":
        return None
    meters: dict[str, Any] = record["meters"]
    environment = record["environment"]
    capacity = meters.get("capacity") or {}
    spec = spec_from_mapping({**record["spec"], "device": environment["device"]})
    return Measured(
        key=record["key"],
        spec=spec,
        resident_bytes=meters["resident_bytes"],
        peak_allocated_bytes=meters["peak_allocated_bytes"],
        peak_reserved_bytes=meters["peak_reserved_bytes"],
        failed_cap_bytes=capacity.get("failed_cap_bytes"),
        passed_cap_bytes=capacity.get("passed_cap_bytes"),
        non_torch_bytes=meters["driver"]["non_torch_bytes"] + meters["driver"]["others_used_bytes"],
        step_s=meters["step_seconds"]["median_s"],
        fresh=not (record.get("process") or {}).get("position"),
    )


def residuals(measured: Iterable[Measured]) -> tuple[list[Residual], list[tuple[Measured, str]]]:
    """Residuals, and what the planner refuses with its reason."""
    found, refused = [], []
    for row in measured:
        try:
            predicted = estimate(row.spec)
        except VramwiseError as error:
            refused.append((row, str(error)))
            continue
        found.append(
            Residual(
                row, predicted,
                predicted.resident_bytes / row.resident_bytes - 1,
                predicted.peak_allocated_bytes / row.peak_allocated_bytes - 1,
                bracket_error(predicted.allocator_required_bytes, row),
                predicted.step_seconds / row.step_s - 1,
            )
        )  # fmt: skip
    return found, refused


def bracket_error(required_bytes: int, row: Measured) -> float | None:
    """0 inside (failed, passed], else the relative distance to the nearer end."""
    failed, passed = row.failed_cap_bytes, row.passed_cap_bytes
    if failed is None or passed is None:
        return None
    if required_bytes > passed:
        return required_bytes / passed - 1
    return min(required_bytes / failed - 1, 0.0)
