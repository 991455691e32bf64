"""Learning a device from records: speeds fitted to two thirds, and judged on the held-out third.

The bands of the requirement are read off every record: no byte of the memory model is fitted to any
of them, so each is held out from it. So are the ranges of seconds, which say how far hosts differ.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import ceil, exp, floor
from statistics import median

from planner.calibration import Band, Calibration, Rates, band_key, covered_name
from planner.devices import find_device
from planner.errors import InputError, Problem
from planner.memory.program import run
from planner.models.registry import load_model
from planner.residuals import Residual
from planner.throughput.model import Load, load_of, parts

# Where the search for each rate starts (an H200's), and its limits.
_RATES: dict[str, tuple[float, float, float]] = {
    "matmul_share": (0.6, 0.2, 1.0),
    "bandwidth_share": (0.55, 0.3, 1.5),
    "launch_s": (3e-5, 5e-6, 1e-4),
    "compiled_launch_s": (5e-5, 5e-6, 3e-4),
    "hook_s": (3e-5, 1e-6, 1e-4),
    "search_flops": (1e3, 10.0, 1e5),
}
_UNKNOWN_RANGE = (0.5, 2.0)  # of seconds, where no record is bound so
_ROUNDS, _POINTS, _SPAN, _NARROWING = 14, 41, 1.2, 0.75


@dataclass(frozen=True, slots=True)
class Timed:
    """A step's load and its measured seconds."""

    load: Load
    seconds: float


def learn(device_name: str, rows: Sequence[Residual]) -> Calibration:
    """The calibration of a device from its residuals; InputError where there are too few."""
    device = find_device(device_name)
    fitted = [row for row in rows if not row.measured.held_out]
    held_out = [row for row in rows if row.measured.held_out]
    if len(fitted) < 6 or len(held_out) < 3:
        found = f"{len(fitted)} to learn from, {len(held_out)} held out"
        raise InputError(Problem("records", "are too few", found, "at least 6 and 3"))
    timed = {
        row.measured.key: Timed(load_of(row.measured.spec, device, _work(row)), row.measured.step_s)
        for row in rows
    }
    spec = rows[0].measured.spec
    return Calibration(
        device=device.id,
        rates=with_ranges(
            fit_rates([timed[row.measured.key] for row in fitted]), list(timed.values())
        ),
        bands=bands(rows),
        model_types=tuple(
            sorted({covered_name(row.measured.spec.stack, _model_type(row)) for row in rows})
        ),
        versions={"torch": spec.versions.torch, "transformers": spec.versions.transformers},
        records=len(rows),
    )


def fit_rates(timed: Sequence[Timed]) -> Rates:
    """The rates with the smallest mean relative error, one after another by grids that close in; a
    rate that no record depends on stays where it starts. The ranges are those of these records.
    """
    starts = {name: start for name, (start, _, _) in _RATES.items()}
    rates = Rates(**starts, gpu_range=(1.0, 1.0), host_range=(1.0, 1.0))
    least = _mean_error(rates, timed)
    span = _SPAN
    for _ in range(_ROUNDS):
        for name, (_, low, high) in _RATES.items():
            at = getattr(rates, name)
            for index in range(_POINTS):
                value = at * exp(span * (2 * index / (_POINTS - 1) - 1))
                tried = rates._replace(**{name: min(max(value, low), high)})
                error = _mean_error(tried, timed)
                if error < least:
                    least, rates = error, tried
        span *= _NARROWING
    return with_ranges(rates, timed)


def _mean_error(rates: Rates, timed: Sequence[Timed]) -> float:
    return sum(abs(_error(rates, row)) for row in timed) / len(timed)


def _seconds(rates: Rates, load: Load) -> tuple[float, bool]:
    arithmetic, traffic, launches = parts(rates, load)
    return max(arithmetic + traffic, launches), bool(launches > arithmetic + traffic)


def _error(rates: Rates, row: Timed) -> float:
    return _seconds(rates, row.load)[0] / row.seconds - 1


def with_ranges(rates: Rates, timed: Sequence[Timed]) -> Rates:
    """The rates with ranges that cover all of `timed`."""
    ranges = {}
    for by_host in (False, True):
        ratios = sorted(
            row.seconds / _seconds(rates, row.load)[0]
            for row in timed
            if _seconds(rates, row.load)[1] == by_host
        )
        ranges[by_host] = _ends(ratios) if ratios else _UNKNOWN_RANGE
    rounded = {name: float(f"{getattr(rates, name):.4g}") for name in _RATES}
    return Rates(**rounded, gpu_range=ranges[False], host_range=ranges[True])


def _ends(ratios: Sequence[float]) -> tuple[float, float]:
    """The least and the most, and 1 inside: hosts differ, and an interval is to hold on each."""
    low, high = min(1.0, ratios[0]), max(1.0, ratios[-1])
    return floor(1000 * low) / 1000, ceil(1000 * high) / 1000


def bands(rows: Iterable[Residual]) -> dict[str, Band]:
    """Truth over prediction on the bisected records, by kind of configuration: from the largest
    cap that failed to the smallest that passed; the prediction itself is always inside."""
    found: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        measured = row.measured
        if measured.failed_cap_bytes is None or measured.passed_cap_bytes is None:
            continue
        predicted = row.predicted.allocator_required_bytes
        spec = measured.spec
        key = band_key(spec.stack, spec.gradient_checkpointing)
        ends = (
            measured.failed_cap_bytes / predicted - 1,
            measured.passed_cap_bytes / predicted - 1,
        )
        found.setdefault(key, []).append(ends)
    return {
        key: Band(
            round(min(0.0, *(low for low, _ in ends)), 4),
            round(max(0.0, *(high for _, high in ends)), 4),
            len(ends),
        )
        for key, ends in found.items()
    }


def spread_of(errors: Iterable[float]) -> tuple[float, float, float]:
    """(median absolute, worst absolute, bias) of relative errors."""
    values = list(errors)
    sizes = [abs(value) for value in values]
    return median(sizes), max(sizes), sum(values) / len(values)


def _work(row: Residual):  # type: ignore[no-untyped-def]
    return run(row.measured.spec, load_model(row.measured.spec.model)).work


def _model_type(row: Residual) -> str:
    return load_model(row.measured.spec.model).model_type
