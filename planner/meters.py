"""What else the records measured: the card as the driver sees it, loading, evaluation, the host."""

# Annotations stay objects here: named tuples would compile each string at import.
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from planner.residuals import Measured


class Meters(NamedTuple):
    """One record's meters beside those of the training step, in bytes; None where not measured.

    outside_bytes: driver-level use less what torch reserves, at one moment after the steps;
    idle_bytes: the part of it that the card showed before the process. load_peak_bytes: None where
    weights were drawn at random on the card instead of loaded.
    """

    key: str
    weights: str
    outside_bytes: int | None
    idle_bytes: int | None
    load_peak_bytes: int | None
    evaluation_peak_bytes: int | None
    host_peak_bytes: int | None


def read_meters(paths: Iterable[Path]) -> dict[str, Meters]:
    """Meters of completed records by key, the last of each; what is no record is passed over, as
    `planner.residuals.read_measured` does, which has told it."""
    found: dict[str, Meters] = {}
    for path in paths:
        for file in sorted(path.rglob("*.jsonl")) if path.is_dir() else [path]:
            for line in file.read_text(encoding="utf-8").splitlines():
                meters = _meters(line)
                if meters is not None:
                    found[meters.key] = meters
    return found


def _meters(line: str) -> Meters | None:
    try:
        record: dict[str, Any] = json.loads(line)
    except json.JSONDecodeError:
        return None
    if record.get("schema_version") != 1 or record.get("outcome") != "ok":
        return None
    meters = record["meters"]
    driver, phases = meters.get("driver"), meters["phases"]
    outside = idle = None
    if driver is not None:
        idle = driver["others_used_bytes"]
        outside = driver["non_torch_bytes"] + idle
    weights = record["options"].get("weights", "random")
    return Meters(
        record["key"], weights, outside, idle,
        None if weights == "random" else _peak(phases, "load"), _peak(phases, "evaluation"),
        meters.get("host_peak_rss_bytes"),
    )  # fmt: skip


def _peak(phases: dict[str, Any], name: str) -> int | None:
    return int(phases[name]["peak_allocated_bytes"]) if name in phases else None


def device_range(measured: Measured, meters: Meters) -> tuple[int, int] | None:
    """(least, most) that the card must have had free: the requirement lies between the cap that
    failed (or peak allocated) and the one that passed (or peak reserved); beside it lies what is
    outside the allocator."""
    if meters.outside_bytes is None:
        return None
    low = measured.failed_cap_bytes or measured.peak_allocated_bytes
    high = measured.passed_cap_bytes or measured.peak_reserved_bytes
    return low + meters.outside_bytes, high + meters.outside_bytes


def range_error(estimate_bytes: int, low_bytes: int, high_bytes: int) -> float:
    """0 inside [low, high], else the relative distance to the nearer end."""
    if estimate_bytes > high_bytes:
        return estimate_bytes / high_bytes - 1
    return min(estimate_bytes / low_bytes - 1, 0.0)
