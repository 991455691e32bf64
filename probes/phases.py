"""The phases of a training step, told apart by hooks that any loop meets.

forward (the model's call up to the head's output), loss (to the end of the call), backward,
clipping (backward's end to the optimizer), optimizer, between (the rest: data, zeroing). Nothing in
the step is replaced: module hooks, torch's global optimizer hooks, and a wrapper of
`Tensor.backward` that marks and calls the original.
"""

from __future__ import annotations

import contextlib
import itertools
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from torch.optim import optimizer as torch_optimizer

from probes.meters import Levels, Meter
from probes.records import PhaseMeters, Spread

TRAINING_PHASES = ("forward", "loss", "backward", "clipping", "optimizer", "between")


@dataclass
class _Tally:
    peak_allocated: int = 0
    peak_active: int = 0
    peak_reserved: int = 0
    peak_inactive_split: int = 0
    end_allocated: int = 0
    end_reserved: int = 0
    intervals: dict[int, list[tuple[Any, Any]]] = field(default_factory=lambda: defaultdict(list))

    def add(self, levels: Levels) -> None:
        self.peak_allocated = max(self.peak_allocated, levels.peak_allocated)
        self.peak_active = max(self.peak_active, levels.peak_active)
        self.peak_reserved = max(self.peak_reserved, levels.peak_reserved)
        self.peak_inactive_split = max(self.peak_inactive_split, levels.peak_inactive_split)
        self.end_allocated = max(self.end_allocated, levels.allocated)
        self.end_reserved = max(self.end_reserved, levels.reserved)


class PhaseClock:
    """Cuts a run into phases. `enter` closes the phase before; steps are counted by `step_end`."""

    def __init__(self, meter: Meter) -> None:
        self.meter = meter
        self.current: str | None = None
        self.step = 0
        self.tallies: dict[str, _Tally] = {}
        self.step_marks: list[Any] = []
        self.optimizer_calls = 0
        self.evaluations = 0
        self._started: Any = None
        self._held = False

    def enter(self, phase: str | None) -> None:
        """Close the current phase and open `phase`; None closes only."""
        if self._held or (phase == self.current and phase is not None):
            return
        self.optimizer_calls += phase == "optimizer"
        now = self.meter.mark()
        if self.current is not None:
            tally = self.tallies.setdefault(self.current, _Tally())
            tally.add(self.meter.levels())
            tally.intervals[self.step + self.evaluations].append((self._started, now))
        self.meter.reset_peaks()
        self.current, self._started = phase, now

    def begin(self, phase: str = "between") -> None:
        self.step_marks = [self.meter.mark()]
        self.enter(phase)

    def step_end(self) -> None:
        """An optimizer step, its gradients zeroed, is over."""
        self.enter("between")
        self.step += 1
        self.step_marks.append(self.meter.mark())

    def hold(self, phase: str) -> None:
        """Enter `phase` and stay in it, whatever the hooks see, until `release`."""
        self.enter(phase)
        self._held = True

    def release(self) -> None:
        self._held = False
        self.enter(None)
        self.evaluations += 1

    def peak(self, name: str) -> tuple[int, str]:
        """(bytes, phase) of the largest `peak_<name>` over the training phases."""
        found = [(getattr(t, f"peak_{name}"), p) for p, t in self.tallies.items()]
        return max((f for f in found if f[1] in TRAINING_PHASES), default=(0, ""))

    def step_seconds(self, warmup: int) -> Spread | None:
        """Step durations after the first `warmup` steps. Needs a synchronised device."""
        marks = self.step_marks
        return spread([
            self.meter.seconds(a, b)
            for i, (a, b) in enumerate(itertools.pairwise(marks))
            if i >= warmup
        ])  # fmt: skip

    def meters(self, warmup: int) -> dict[str, PhaseMeters]:
        """Every phase's meters; seconds from the steps after warm-up."""
        return {phase: self._phase(phase, tally, warmup) for phase, tally in self.tallies.items()}

    def _phase(self, phase: str, tally: _Tally, warmup: int) -> PhaseMeters:
        sums = [
            sum(self.meter.seconds(a, b) for a, b in pairs)
            for step, pairs in sorted(tally.intervals.items())
            if step >= warmup and (step < self.step or phase not in TRAINING_PHASES)
        ]
        if len(sums) > 1 and phase not in TRAINING_PHASES:
            sums = sums[1:]  # evaluation has its own first time
        return PhaseMeters(
            peak_allocated_bytes=tally.peak_allocated,
            peak_active_bytes=tally.peak_active,
            peak_reserved_bytes=tally.peak_reserved,
            end_allocated_bytes=tally.end_allocated,
            end_reserved_bytes=tally.end_reserved,
            peak_inactive_split_bytes=tally.peak_inactive_split,
            seconds=spread(sums),
        )


def spread(seconds: list[float]) -> Spread | None:
    """Median and extremes of repeats, or None of none."""
    if not seconds:
        return None
    return Spread(
        median_s=median(seconds), min_s=min(seconds), max_s=max(seconds), count=len(seconds)
    )


@contextlib.contextmanager
def watching(clock: PhaseClock, model: torch.nn.Module) -> Iterator[PhaseClock]:
    """Attach the clock to a model's calls, to backward and to every optimizer; detach after."""
    handles: list[Any] = [
        model.register_forward_pre_hook(lambda *_: clock.enter("forward")),
        *_loss_hooks(clock, model),
        torch_optimizer.register_optimizer_step_pre_hook(lambda *_: clock.enter("optimizer")),
        torch_optimizer.register_optimizer_step_post_hook(lambda *_: clock.enter("between")),
    ]
    original = torch.Tensor.backward

    def backward(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        clock.enter("backward")
        original(tensor, *args, **kwargs)
        clock.enter("clipping")

    torch.Tensor.backward = backward  # type: ignore[method-assign, assignment]
    try:
        yield clock
    finally:
        torch.Tensor.backward = original  # type: ignore[method-assign]
        for handle in handles:
            handle.remove()


def _loss_hooks(clock: PhaseClock, model: torch.nn.Module) -> list[Any]:
    """The loss starts when the head's output is there."""
    head = getattr(model, "get_output_embeddings", lambda: None)()

    def after_head(*_: Any) -> None:
        if clock.current == "forward":
            clock.enter("loss")

    return [head.register_forward_hook(after_head)] if head is not None else []
