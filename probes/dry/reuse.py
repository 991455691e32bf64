"""A second spec of the same model, at another batch or length, from traces of the first.

Three traces at the corners of a range of (micro batch, length) are held side by side. Where their
events are the same but for sizes, and every dimension of every storage is k·m + c for one m of
1, b, s, b·s, the events of any spec inside the range follow exactly. Where they are not (a kernel
chosen by the number of rows, a layout that depends on values) the range is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import prod

import torch
from transformers import PretrainedConfig

from planner.errors import UnsupportedError
from planner.memory.program import paused_collector
from planner.spec import RunSpec
from probes.dry.events import Event, Trace
from probes.dry.recorder import ROUNDING_BYTES
from probes.dry.target import Target
from probes.dry.trace import trace

LENGTH_STEP = 128  # attention kernels round rows up to this: within it sizes are no polynomials
Pair = tuple[int, int]  # (micro batch, length)
_MONOMIALS: tuple[Callable[[int, int], int], ...] = (
    lambda b, s: b, lambda b, s: s, lambda b, s: b * s,
)  # fmt: skip
_ITEM_BYTES = {
    str(d).removeprefix("torch."): d.itemsize for d in vars(torch).values()
    if isinstance(d, torch.dtype)
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Dimension:
    """k · monomial(b, s) + c; monomial None: the constant c."""

    c: int
    k: int = 0
    monomial: int | None = None

    def at(self, batch: int, length: int) -> int:
        """Its value at one (batch, length)."""
        if self.monomial is None:
            return self.c
        return self.k * _MONOMIALS[self.monomial](batch, length) + self.c


@dataclass(frozen=True, slots=True)
class Size:
    """Bytes of one storage: item_bytes times its dimensions, rounded up to a block."""

    dimensions: tuple[Dimension, ...]
    item_bytes: int

    def shape_at(self, batch: int, length: int) -> tuple[int, ...]:
        """The storage's shape."""
        return tuple(dimension.at(batch, length) for dimension in self.dimensions)

    def bytes_of(self, shape: Sequence[int]) -> int:
        """As the recorder counts it."""
        return -(-prod(shape) * self.item_bytes // ROUNDING_BYTES) * ROUNDING_BYTES


@dataclass(frozen=True)
class Reusable:
    """Traces of one spec over a range. `low`, `high`: its corners, both traced."""

    low: Pair
    high: Pair
    base: Trace
    sizes: dict[int, Size]  # storage id -> size, of those that change

    def at(self, batch: int, length: int) -> Trace:
        """The trace of `batch` x `length`, without tracing. Raises UnsupportedError outside the
        range."""
        inside = self.low[0] <= batch <= self.high[0] and self.low[1] <= length <= self.high[1]
        if not inside or length % LENGTH_STEP:
            raise UnsupportedError(
                f"{batch} x {length} is not between {self.low[0]} x {self.low[1]} and "
                f"{self.high[0]} x {self.high[1]} in steps of {LENGTH_STEP}: trace it"
            )
        sized = {}
        for key, size in self.sizes.items():
            shape = size.shape_at(batch, length)
            sized[key] = (shape, size.bytes_of(shape))
        with paused_collector():
            events = [_resized(event, sized) for event in self.base.events]
        return replace(self.base, events=events, evaluation=[], seconds=0.0)


def reusable(
    spec: RunSpec, batches: Pair, lengths: Pair, *, config: PretrainedConfig | None = None,
    target: Target | None = None,
) -> Reusable:  # fmt: skip
    """Trace `spec` at three corners of the range and fit the sizes.

    Raises UnsupportedError where the events differ or a size follows no rule.
    """
    if any(length % LENGTH_STEP for length in lengths):
        raise UnsupportedError(f"lengths of a range are multiples of {LENGTH_STEP}")
    low, high = (batches[0], lengths[0]), (batches[1], lengths[1])
    corners = list(dict.fromkeys([low, high, (batches[0], lengths[1]), (batches[1], lengths[0])]))
    points = corners[:3]
    traces = []
    for batch, length in points:
        sized = {"micro_batch_size": batch, "sequence_length": length, "evaluation_batch_size": 0}
        traces.append(trace(spec.model_copy(update=sized), config=config, target=target))
    return Reusable(low, high, traces[0], _fitted(points, [run.events for run in traces]))


def _fitted(points: list[Pair], runs: list[list[Event]]) -> dict[int, Size]:
    if len({len(run) for run in runs}) > 1:
        counts = ", ".join(f"{len(run)} at {b} x {s}" for run, (b, s) in zip(runs, points))  # noqa: B905
        raise UnsupportedError(f"the traces differ in their number of events: {counts}")
    names: list[dict[int, int]] = [{} for _ in runs]
    sizes: dict[int, Size] = {}
    for position, events in enumerate(zip(*runs, strict=True)):
        keys = {_key(event, known, position) for event, known in zip(events, names, strict=True)}
        if len(keys) > 1:
            raise UnsupportedError(
                f"the traces differ at event {position}: {events[0].op} in {events[0].module}, "
                + " or ".join(event.op for event in events[1:])
            )
        if events[0].kind == "alloc" and len({event.shape for event in events}) > 1:
            sizes[events[0].storage_id] = _size(points, events)
    return sizes


def _key(event: Event, known: dict[int, int], position: int) -> tuple[object, ...]:
    """What must be alike: everything but the sizes; a storage is named by the event that made it
    (one that an earlier part made, by its distance)."""
    if event.kind == "alloc":
        known[event.storage_id] = position
    name = known.get(event.storage_id, -1)
    return (event.kind, event.op, event.module, event.phase, event.dtype, event.step,
            event.category, len(event.shape), name)  # fmt: skip


def _size(points: list[Pair], events: Sequence[Event]) -> Size:
    item = _ITEM_BYTES[events[0].dtype]
    if any(event.op in _RAW for event in events):
        item = 1
    shapes = [event.shape for event in events]
    size = Size(tuple(_dimension(points, values, events[0]) for values in zip(*shapes)), item)  # noqa: B905
    if any(size.bytes_of(event.shape) != event.size_bytes for event in events):
        size = Size(size.dimensions, 1)  # a buffer without a tensor: its shape is its bytes
    if any(size.bytes_of(event.shape) != event.size_bytes for event in events):
        raise UnsupportedError(f"{events[0].op}: its storage is not its shape's")
    return size


_RAW = ("flash_attention_backward", "efficient_attention_backward")


def _dimension(points: list[Pair], values: Sequence[int], event: Event) -> Dimension:
    """The one rule that gives all values; without a constant where that is possible."""
    if len(set(values)) == 1:
        return Dimension(values[0])
    found = []
    varied = [len(set(column)) > 1 for column in zip(*points, strict=True)]
    for index, monomial in enumerate(_MONOMIALS):
        if not all(varied) and index != varied.index(True):
            continue  # with one of them fixed, b and b·s say the same
        at = [monomial(*point) for point in points]
        pairs = [(m, v) for m, v in zip(at, values, strict=True) if m != at[0]]
        if not pairs:
            continue
        m, v = pairs[0]
        k, rest = divmod(v - values[0], m - at[0])
        c = values[0] - k * at[0]
        if not rest and all(k * x + c == y for x, y in zip(at, values, strict=True)):
            found.append(Dimension(c, k, index))
    found.sort(key=lambda rule: rule.c != 0)
    plain = [rule for rule in found if rule.c == 0]
    if len(plain) == 1 or (not plain and len(found) == 1):
        return found[0]
    raise UnsupportedError(f"{event.op} in {event.module}: sizes {values} follow no single rule")


def _resized(event: Event, sized: dict[int, tuple[tuple[int, ...], int]]) -> Event:
    found = sized.get(event.storage_id)
    if found is None:
        return event
    return Event(
        event.kind, event.storage_id, found[1], event.op, event.module, event.phase, found[0],
        event.dtype, event.category, event.step, event.section,
    )  # fmt: skip
