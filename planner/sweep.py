"""Every combination of a grid, each with what `fit` answers.

Combinations are grouped by all that needs another run of the step. Within a group only sizes differ
(micro batch, sequence, rank), and what a run does not depend on: accumulation beyond two, the card
and its memory, the schedule.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any, NamedTuple

from planner.devices import Device
from planner.errors import VramwiseError
from planner.estimate import Requirement, check, device_of, fit_on, requirement
from planner.levers import apply
from planner.memory.program import Program, run
from planner.memory.workspace import cublas_workspace_bytes
from planner.models.registry import Model, load_model
from planner.spec import RunSpec, spec_from_mapping
from planner.sweep_grid import Grid

SIZES = ("micro_batch_size", "sequence_length", "lora.rank")
CARDS = ("gradient_accumulation_steps", "device", "device_memory")  # share a run of the step
_KEPT = 8  # runs that `evaluate` remembers
IMPOSSIBLE = "impossible"


class Row(NamedTuple):
    """One combination. `values` are those of the grid's axes, in its order; `reason` says why a
    combination cannot be (verdict "impossible", every figure None)."""

    values: tuple[Any, ...]
    verdict: str
    reason: str = ""
    resident_bytes: int | None = None
    peak_allocated_bytes: int | None = None
    allocator_required_bytes: int | None = None
    device_required_bytes: int | None = None
    device_required_low_bytes: int | None = None
    device_required_high_bytes: int | None = None
    device_total_bytes: int | None = None
    step_seconds: float | None = None
    tokens_per_second: float | None = None
    basis: str = ""


@dataclass
class _Needs:
    """A program and its requirements by workspace, filled as cards ask."""

    program: Program
    by_workspace: dict[int, Requirement]


def evaluate(specs: Iterable[RunSpec | Mapping[str, Any]]) -> Iterator[Row]:
    """A row for each spec, in order. Neighbours that share a run of the step run it once."""
    cache: dict[RunSpec, _Needs | str] = {}
    for item in specs:
        try:
            spec = item if isinstance(item, RunSpec) else spec_from_mapping(item)
        except VramwiseError as error:
            yield Row((), IMPOSSIBLE, str(error))
            continue
        if len(cache) > _KEPT:
            cache.clear()
        yield _row((), spec, cache)


def evaluate_grid(grid: Grid) -> Iterator[Row]:
    """A row for each combination. What needs another run of the step varies slowest, then SIZES,
    then what shares a run; within each the axes keep their order."""
    axes = sorted(grid.axes, key=lambda axis: _speed(axis.name))
    names = [axis.name for axis in axes]
    order = [names.index(axis.name) for axis in grid.axes]
    shared = sum(_speed(name) == 2 for name in names)
    runs, cards = axes[: len(axes) - shared], axes[len(axes) - shared :]
    for run_values in product(*(axis.values for axis in runs)):
        outer = apply(grid.base, dict(zip(names, run_values, strict=False)))
        cache: dict[RunSpec, _Needs | str] = {}
        for card_values in product(*(axis.values for axis in cards)):
            spec = apply(outer, dict(zip(names[len(runs) :], card_values, strict=True)))
            values = (*run_values, *card_values)
            yield _row(tuple(values[i] for i in order), spec, cache)


def _speed(name: str) -> int:
    if name in CARDS or name.startswith("schedule."):
        return 2
    return 1 if name in SIZES else 0


def _row(values: tuple[Any, ...], spec: RunSpec, cache: dict[RunSpec, _Needs | str]) -> Row:
    key = _program_key(spec)
    needs = cache.get(key)
    if needs is None:
        needs = cache[key] = _needs(key)
    if isinstance(needs, str):
        return Row(values, IMPOSSIBLE, needs)
    try:
        device = device_of(spec)
    except VramwiseError as error:
        return Row(values, IMPOSSIBLE, str(error))
    model = load_model(spec.model)
    needed = _requirement(needs, spec, model, device)
    fit = fit_on(spec, device, needs.program, needed)
    return Row(
        values, fit.verdict, "", needed.resident_bytes, needed.peak_allocated_bytes,
        needed.required_bytes, needed.required_bytes + fit.outside.bytes, fit.low_bytes,
        fit.high_bytes, fit.total_bytes, fit.speed.step_s, fit.tokens_per_second,
        needed.interval.basis,
    )  # fmt: skip


def _program_key(spec: RunSpec) -> RunSpec:
    """The spec without what a run of the step does not depend on."""
    return spec.model_copy(
        update={
            "device": None,
            "device_memory": None,
            "gradient_accumulation_steps": min(spec.gradient_accumulation_steps, 2),
            "schedule": RunSpec.model_fields["schedule"].default,
        }
    )


def _needs(key: RunSpec) -> _Needs | str:
    try:
        model = load_model(key.model)
        check(key, model)
        return _Needs(run(key, model), {})
    except VramwiseError as error:
        return str(error)


def _requirement(needs: _Needs, spec: RunSpec, model: Model, device: Device) -> Requirement:
    workspace = cublas_workspace_bytes(device.compute_capability)
    if workspace not in needs.by_workspace:
        needs.by_workspace[workspace] = requirement(spec, model, needs.program, workspace)
    return needs.by_workspace[workspace]
