"""One program for many sizes at once: the live bytes of every (batch, sequence) pair in one run.

Sizes are numpy arrays, and only three and then four decoder layers are run. Layers are alike, so
the live bytes at an event of layer j of L are affine in j and L: two runs give the coefficients,
and the peak lies at one of the ends. Integers throughout: the result is that of a full run, exactly
(tests/planner/memory/test_many.py). Models whose layers differ in kind are run whole.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from planner.memory.loading import Loading
from planner.memory.optimizers import find_optimizer
from planner.memory.program import (
    engine_for,
    forward_of,
    load,
    make_batches,
    may_stretch,
    paused_collector,
)
from planner.memory.sizes import MixedSizesError
from planner.memory.states import state_bytes
from planner.memory.step import StepWork, run_step
from planner.memory.storage import Recorder
from planner.memory.work import Work
from planner.models.registry import Model
from planner.spec import RunSpec

FEW, MORE = 3, 4
Sizes = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True, slots=True)
class Many:
    """Per pair: the most live bytes of the step above what is static, and its work.

    static_bytes: resident tensors and optimizer states, the same for all pairs.
    """

    peak_bytes: Sizes
    resident_bytes: int
    static_bytes: int
    paged_bytes: int
    work: StepWork


class _Segments(Recorder):
    """Live bytes at every allocation, cut where layers and instants start."""

    def __init__(self) -> None:
        super().__init__()
        self.segments: list[tuple[tuple[str, int], list[Any]]] = [(("start", 0), [])]

    def sum_up(self) -> None:
        live, sizes, lives = self._live, self.sizes, self.segments[-1][1]
        for index in self.events[self._summed :]:
            if index < 0:
                live = live - sizes[~index]
            else:
                live = live + sizes[index]
                lives.append(live)
        self._live, self._summed = live, len(self.events)

    def mark(self, label: tuple[str, int]) -> None:
        self.segments.append((label, [self.live_bytes]))

    def enter(self, instant: str) -> None:
        super().enter(instant)
        self.mark((instant, -1))


@dataclass(frozen=True, slots=True)
class _Run:
    segments: list[tuple[tuple[str, int], list[Any]]]
    device_state_bytes: int
    paged_bytes: int
    work: StepWork


def run_many(spec: RunSpec, model: Model, batches: Sizes, lengths: Sizes) -> Many:
    """Evaluate `spec` at each (micro batch, sequence length) pair; its own sizes do not count.

    Where torch or transformers branch on a size, the pairs on either side are run apart.
    """
    try:
        return _run_alike(spec, model, batches, lengths)
    except MixedSizesError as mixed:
        sides = [np.broadcast_to(mixed.truth, batches.shape) == side for side in (True, False)]
        parts = [run_many(spec, model, batches[side], lengths[side]) for side in sides]
        return _joined(sides, parts)


def _joined(sides: list[Any], parts: list[Many]) -> Many:
    yes, no = parts
    work = StepWork(Work(), Work())
    for name in ("micro_batch", "optimizer"):
        for counter in Work.__slots__:
            a, b = (getattr(getattr(part.work, name), counter) for part in parts)
            setattr(getattr(work, name), counter, _merged(sides, a, b))
    peak = _merged(sides, yes.peak_bytes, no.peak_bytes)
    return Many(peak, yes.resident_bytes, yes.static_bytes, yes.paged_bytes, work)


def _merged(sides: list[Any], yes: Any, no: Any) -> Any:
    result = np.empty(sides[0].shape, dtype=np.result_type(yes, no))
    result[sides[0]], result[sides[1]] = yes, no
    return result


def _run_alike(spec: RunSpec, model: Model, batches: Sizes, lengths: Sizes) -> Many:
    whole = model.text.num_hidden_layers
    alike = may_stretch(model, spec) and whole > MORE
    with paused_collector(), np.errstate(over="raise"):
        if alike:
            few = _run(spec, model, batches, lengths, FEW)
            more = _run(spec, model, batches, lengths, MORE)
            result = _extrapolate(few, more, whole)
        else:
            run = _run(spec, model, batches, lengths, None)
            peak = _most([live for _, lives in run.segments for live in lives])
            result = peak, run.device_state_bytes, run.paged_bytes, run.work
    peak, states, paged, work = result
    resident = Loading(load(spec, model)).resident_bytes
    return Many(np.broadcast_to(peak, batches.shape), resident, resident + states, paged, work)


def _run(spec: RunSpec, model: Model, batches: Sizes, lengths: Sizes, layers: int | None) -> _Run:
    loaded = load(spec, model)
    loaded.decoder_layers = layers
    optimizer = find_optimizer(spec.optimizer)
    recorder = _Segments()
    engine = engine_for(spec, recorder)
    sized = spec.model_copy(update={"micro_batch_size": batches, "sequence_length": lengths})
    held = make_batches(recorder, sized, model)
    work = run_step(engine, loaded, forward_of(model), held[0], optimizer)
    graded = {name: leaf for name, leaf in loaded.leaves.items() if leaf.grad is not None}
    states = state_bytes(loaded, optimizer, graded)
    for leaf in graded.values():
        leaf.grad = None
    return _Run(recorder.segments, states.device_bytes, states.paged_bytes, work)


def _most(lives: list[Any]) -> Any:
    peak: Any = 0
    for live in lives:
        peak = np.maximum(peak, live)
    return peak


def _extrapolate(few: _Run, more: _Run, layers: int) -> tuple[Any, int, int, StepWork]:
    """Peak, states and work of `layers` layers from runs of FEW and MORE."""
    extra = layers - FEW
    peak: Any = 0
    for part, low, high in _aligned(few.segments, more.segments):
        if part == "middle":
            first, (second, other) = low, high
            for a, b, c in zip(first, second, other, strict=True):
                at_first = a + (b - a) * extra  # layer 1 of `layers`
                at_last = at_first + (c - b) * (layers - FEW)
                peak = np.maximum(peak, np.maximum(at_first, at_last))
        else:
            if len(low) != len(high):  # clipping and optimizer: an allocation a parameter
                low, high = [_most(low)], [_most(high)]
            for a, b in zip(low, high, strict=True):
                peak = np.maximum(peak, a + (b - a) * extra)
    states = few.device_state_bytes + (more.device_state_bytes - few.device_state_bytes) * extra
    paged = few.paged_bytes + (more.paged_bytes - few.paged_bytes) * extra
    return peak, states, paged, _work(few.work, more.work, extra)


def _aligned(few: Any, more: Any) -> Any:
    """Pairs of segments that play the same part: ("end", few's, more's) of the first, the last and
    no layer; ("middle", few's layer 1, (more's layers 1 and 2))."""
    by_label: dict[Any, list[Any]] = {}
    for label, lives in more:
        by_label.setdefault(label, []).append(lives)
    seen: dict[Any, int] = {}
    for label, lives in few:
        turn = seen.get(label, 0)
        seen[label] = turn + 1
        kind, index = label
        if kind in ("forward", "backward") and index == 1:
            yield "middle", lives, (by_label[label][turn], by_label[(kind, 2)][turn])
        elif kind in ("forward", "backward") and index > 1:
            yield "end", lives, by_label[(kind, index + 1)][turn]
        else:
            yield "end", lives, by_label[label][turn]


def _work(few: StepWork, more: StepWork, extra: int) -> StepWork:
    result = StepWork(type(few.micro_batch)(), type(few.optimizer)())
    for part in ("micro_batch", "optimizer"):
        target, low, high = getattr(result, part), getattr(few, part), getattr(more, part)
        for name in target.__slots__:
            a, b = getattr(low, name), getattr(high, name)
            setattr(target, name, a + (b - a) * extra)
    return result
