"""Every combination of a grid, each with what `fit` answers.

Combinations are grouped by all that needs another run of the step. Within a group only sizes differ
(micro batch, sequence), the card and its memory, the schedule, and accumulation, each number of
which is a run of its own where Trainer holds its inputs. A small grid is answered by `fit`
throughout, a large one by planner.sweep_fast.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from math import prod
from typing import Any, NamedTuple

from planner.devices import Device
from planner.errors import VramwiseError
from planner.estimate import Requirement, check, device_of, fit_on, requirement, resolve
from planner.levers import apply
from planner.memory.program import Program, alike_accumulation, run
from planner.memory.target import kernels_device
from planner.memory.workspace import cublas_workspace_bytes
from planner.models.registry import Model, load_model
from planner.spec import RunSpec, spec_from_mapping
from planner.sweep_fast import NEAR, VERDICTS, CardColumns, Sizes, on_card, run_sizes
from planner.sweep_grid import Axis, Grid

SIZES = ("micro_batch_size", "sequence_length")
# share a run of the step
CARDS = ("gradient_accumulation_steps", "device", "device_memory", "host_memory")
ALWAYS_EXACT = 400  # a grid of so few runs is answered by `fit` throughout
EXACT_NEAR_BOUNDARIES = 200  # else so many rows near a boundary are
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
    order = [axes.index(axis) for axis in grid.axes]
    groups = [axis for axis in axes if _speed(axis.name) == 0]
    sizes = [axis for axis in axes if _speed(axis.name) == 1]
    cards = [axis for axis in axes if _speed(axis.name) == 2]
    allowance = _Allowance(exact=_programs(groups, sizes) <= ALWAYS_EXACT)
    for group_values in product(*(axis.values for axis in groups)):
        outer = apply(grid.base, _named(groups, group_values))
        group = _Group(outer, sizes, cards, allowance)
        for values, row in group.rows():
            whole = (*group_values, *values)
            yield row._replace(values=tuple(whole[i] for i in order))


def _programs(groups: list[Axis], sizes: list[Axis]) -> int:
    return prod(len(axis.values) for axis in (*groups, *sizes))


def _named(axes: list[Axis], values: tuple[Any, ...]) -> dict[str, Any]:
    return {axis.name: value for axis, value in zip(axes, values, strict=True)}


@dataclass
class _Allowance:
    """How many more runs near a boundary the sweep answers exactly; `exact`: all of them."""

    exact: bool
    left: int = EXACT_NEAR_BOUNDARIES


class _Group:
    """Combinations that differ in sizes and cards alone: one vectorised run."""

    def __init__(
        self, spec: RunSpec, sizes: list[Axis], cards: list[Axis], allowance: _Allowance
    ) -> None:
        self.spec = spec
        self.sizes, self.cards = sizes, cards
        self.allowance = allowance
        self.cache: dict[RunSpec, _Needs | str] = {}
        self.by_card: dict[tuple[Any, ...], CardColumns | str] = {}

    def rows(self) -> Iterator[tuple[tuple[Any, ...], Row]]:
        """(values of sizes and cards, row) in order."""
        pairs = [self._pair(values) for values in product(*(a.values for a in self.sizes))]
        combinations = list(product(*(a.values for a in self.cards)))
        cards = [apply(self.spec, _named(self.cards, values)) for values in combinations]
        runs = {}
        for micro_batches in {alike_accumulation(card) for card in cards}:
            runs[micro_batches] = None if self.allowance.exact else self._run(pairs, micro_batches)
        for place, size_values in enumerate(product(*(a.values for a in self.sizes))):
            for card, card_values in zip(cards, combinations, strict=True):
                fast = runs[alike_accumulation(card)]
                values = (*size_values, *card_values)
                yield values, self._one(fast, place, size_values, card_values)

    def _pair(self, values: tuple[Any, ...]) -> tuple[int, int]:
        named = _named(self.sizes, values)
        return (
            named.get("micro_batch_size", self.spec.micro_batch_size),
            named.get("sequence_length", self.spec.sequence_length),
        )

    def _run(
        self, pairs: list[tuple[int, int]], micro_batches: int
    ) -> tuple[Sizes, dict[int, int]] | None:
        """The vectorised run of the pairs that can be, and each one's place in it."""
        spec = apply(self.spec, {"gradient_accumulation_steps": micro_batches})
        try:
            model = load_model(self.spec.model)
            possible = [i for i, pair in enumerate(pairs) if self._possible(model, pair)]
            host = self.spec.host_memory or any(a.name == "host_memory" for a in self.cards)
            own = self.spec.evaluation_batch_size or host
            if not possible or own or self.spec.stack != "stock":
                return None
            sizes = run_sizes(spec, model, [pairs[i] for i in possible])
        except VramwiseError:
            return None
        return sizes, {index: place for place, index in enumerate(possible)}

    def _possible(self, model: Model, pair: tuple[int, int]) -> bool:
        sized = {"micro_batch_size": pair[0], "sequence_length": pair[1]}
        try:
            check(self.spec.model_copy(update=sized), model)
        except VramwiseError:
            return False
        return True

    def _one(
        self, fast: tuple[Sizes, dict[int, int]] | None, place: int,
        size_values: tuple[Any, ...], card_values: tuple[Any, ...],
    ) -> Row:  # fmt: skip
        at = fast[1].get(place) if fast else None
        if fast is not None and at is not None:
            columns = self._columns(fast[0], card_values)
            if isinstance(columns, str):
                return Row((), IMPOSSIBLE, columns)
            if columns.verdicts[at] != NEAR or not self.allowance.left:
                return _bounded(fast[0], columns, at)
            self.allowance.left -= 1
        named = {**_named(self.sizes, size_values), **_named(self.cards, card_values)}
        return _row((), apply(self.spec, named), self.cache)

    def _columns(self, sizes: Sizes, card_values: tuple[Any, ...]) -> CardColumns | str:
        found = self.by_card.get(card_values)
        if found is None:
            spec = apply(self.spec, _named(self.cards, card_values))
            try:
                found = on_card(sizes, spec, device_of(spec))
            except VramwiseError as error:
                found = str(error)
            self.by_card[card_values] = found
        return found


def _bounded(sizes: Sizes, columns: CardColumns, at: int) -> Row:
    """A row that carries bounds: the requirement lies between its low and its high."""
    verdict = columns.verdicts[at]
    return Row(
        (), VERDICTS[verdict] if verdict != NEAR else "tight", "", sizes.resident_bytes,
        columns.live_bytes[at], None, None, columns.low_bytes[at], columns.high_bytes[at],
        columns.total_bytes, columns.step_s[at], columns.tokens_per_s[at], "bounds",
    )  # fmt: skip


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
        return Row(values, IMPOSSIBLE, _reason(spec, needs))
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


def _reason(spec: RunSpec, otherwise: str) -> str:
    """All that `fit` would tell; `otherwise` where it finds nothing before the step is run."""
    try:
        resolve(spec)
    except VramwiseError as error:
        return str(error)
    return otherwise


def _program_key(spec: RunSpec) -> RunSpec:
    """The spec without what a run of the step does not depend on."""
    return spec.model_copy(
        update={
            "device": kernels_device(spec),
            "device_memory": None,
            "host_memory": None,
            "gradient_accumulation_steps": alike_accumulation(spec),
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
