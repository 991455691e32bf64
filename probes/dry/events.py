"""What a traced step leaves behind: allocations and releases in order, and what follows."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

from planner.memory.replay import EMPTY_CACHE, RESET_PEAKS, Replay, replay
from planner.memory.step import StepWork
from planner.memory.work import Work

Category = Literal[
    "parameters", "gradients", "optimizer_states", "saved_activations", "logits", "temporaries",
    "inputs", "workspace",
]  # fmt: skip
Phase = Literal[
    "load", "inputs", "forward", "backward", "recompute", "clip", "optimizer", "zero_grad",
    "evaluate",
]  # fmt: skip


STEPS = 4  # of a replay: layouts change from step to step until about then


@dataclass(slots=True)
class Event:
    """One storage allocated or freed.

    size_bytes: rounded up to 512, as the caching allocator counts it; op: the aten (or library)
    operation whose result or temporary it is; module: path in `named_modules()` of the innermost
    module running ("" outside any; in backward the module whose forward made the node); section:
    counts forwards, backwards and recomputations, so that what outlives its section can be told.
    """

    kind: Literal["alloc", "free", "empty_cache"]
    storage_id: int
    size_bytes: int
    op: str
    module: str
    phase: Phase
    shape: tuple[int, ...]
    dtype: str
    category: Category | None
    step: int
    section: int = 0


@dataclass(frozen=True, slots=True)
class LiveBytes:
    """Bytes live at one instant under one label, and how many storages they are."""

    category: str
    module: str
    operation: str
    size_bytes: int
    storages: int


@dataclass
class Trace:
    """A traced run: loading (`load`), then the steps (`events`), which start with what it left.

    Sizes are those of the storages; `stream` gives the allocator's input, whose blocks also hold
    what it does not split off.
    """

    load: list[Event]
    events: list[Event]
    unknown_operations: tuple[str, ...] = ()
    evaluation: list[Event] = field(default_factory=list)
    seconds: float = 0.0
    total_parameters: int = 0
    trainable_parameters: int = 0
    expandable: bool = False
    model_type: str = ""
    components: dict[str, str] = field(default_factory=dict)  # module path -> planner's component
    parameters_by_component: dict[str, int] = field(default_factory=dict)
    paged_bytes: int = 0  # of optimizer states in managed memory
    work: StepWork = field(default_factory=lambda: StepWork(Work(), Work()))
    base_events: int = 0  # of `load`: from_pretrained's; preparation and adapters come after

    @property
    def resident_bytes(self) -> int:
        """Live bytes after loading and adapter set-up, before the first step."""
        return live_bytes(self.load)

    @property
    def peak_live_bytes(self) -> int:
        """Largest sum of live storages over the steps."""
        return peak(self.load, self.events)[0]

    @property
    def peak_allocated_bytes(self) -> int:
        """What `torch.cuda.max_memory_allocated()` should say: blocks, remainders included."""
        return self.replayed.peak_allocated_bytes

    @property
    def allocated_after_load_bytes(self) -> int:
        """What `torch.cuda.memory_allocated()` should say before the first step."""
        return replay(stream(self.load), expandable_segments=self.expandable).allocated_bytes

    @cached_property
    def replayed(self) -> Replay:
        """Loading and `STEPS` steps through the caching allocator, peaks reset after loading."""
        return self.replayed_for(STEPS)

    def replayed_for(self, steps: int) -> Replay:
        """The same for a run of so many steps: what is not split off settles over a few."""
        whole = [*stream(self.load), RESET_PEAKS, *self.steps_stream(steps)]
        return replay(whole, expandable_segments=self.expandable)

    @property
    def base_load_peak_bytes(self) -> int:
        """Peak allocated inside `from_pretrained`."""
        before = stream(self.load[: self.base_events])
        return replay(before, expandable_segments=self.expandable).peak_allocated_bytes

    def steps_stream(self, count: int) -> list[tuple[int, int]]:
        """The steps, the last one again until there are `count`: it frees what the one before it
        left, so a repeat frees what the one it repeats left. Raises ValueError where they differ.
        """
        events = stream(self.events)
        start = next(i for i, e in enumerate(self.events) if e.step == self.events[-1].step)
        last, heirs = events[start:], _heirs(self.events[start:])
        names: dict[int, int] = {}
        first = 1 + max(key for key, _ in events)
        for repeat in range(count - self.events[-1].step):
            offset = first * (repeat + 1)
            before, names = names, {}
            for key, size in last:
                if size:
                    names[key] = key + offset
                    events.append((key + offset, size))
                elif key in names:
                    events.append((names[key], 0))
                else:
                    heir = heirs[key]
                    events.append((before.get(heir, heir), 0))
        return events

    def whole_stream(self) -> list[tuple[int, int]]:
        """Everything the run asks for, evaluation included."""
        return stream([*self.load, *self.events, *self.evaluation])

    @property
    def peak_index(self) -> int:
        """Index in `events` of the allocation that reaches the peak."""
        return peak(self.load, self.events)[1]

    @property
    def peak_instant(self) -> str:
        """The peak's step, phase, module and operation, in words."""
        event = self.events[self.peak_index]
        where = f" in {event.module}" if event.module else ""
        return f"step {event.step}, {event.phase}: {event.op}{where}"

    @property
    def load_peak_bytes(self) -> int:
        """Peak allocated while loading. The block that `from_pretrained` takes first to warm the
        allocator up is not held at once with the weights, but may itself be the peak."""
        return replay(stream(self.load), expandable_segments=self.expandable).peak_allocated_bytes

    @property
    def eval_peak_bytes(self) -> int | None:
        """Peak of an evaluation step after the training steps, or None when there is none."""
        if not self.evaluation:
            return None
        before = stream([*self.load, *self.events])
        whole = [*before, RESET_PEAKS, *stream(self.evaluation)]
        return replay(whole, expandable_segments=self.expandable).peak_allocated_bytes

    def live_at_peak(self) -> list[LiveBytes]:
        """What fills the peak, by category, module and operation; largest first.

        The sizes sum to `peak_live_bytes`.
        """
        live = live_storages([*self.load, *self.events[: self.peak_index + 1]])
        rows = grouped(live)
        return sorted(rows, key=lambda row: -row.size_bytes)


def stream(events: Sequence[Event]) -> list[tuple[int, int]]:
    """Events as the allocator's input (planner.memory.allocator.replay)."""
    return [
        EMPTY_CACHE if e.kind == "empty_cache"
        else (e.storage_id, e.size_bytes if e.kind == "alloc" else 0)
        for e in events
    ]  # fmt: skip


def _heirs(events: Sequence[Event]) -> dict[int, int]:
    """What a step frees of the step before -> what it leaves for the next, alike one by one."""
    made = {e.storage_id for e in events if e.kind == "alloc"}
    left: dict[tuple[int, str], list[int]] = defaultdict(list)
    for event in live_storages([e for e in events if e.storage_id in made]):
        left[event.size_bytes, event.op].append(event.storage_id)
    heirs: dict[int, int] = {}
    for event in events:
        if event.kind == "free" and event.storage_id not in made:
            alike = left[event.size_bytes, event.op]
            if not alike:
                raise ValueError(f"a step frees {event.op} of the one before and leaves none")
            heirs[event.storage_id] = alike.pop(0)
    return heirs


def live_bytes(events: Sequence[Event]) -> int:
    """Bytes still live after `events`."""
    return sum(e.size_bytes if e.kind == "alloc" else -e.size_bytes for e in events)


def peak(before: Sequence[Event], events: Sequence[Event]) -> tuple[int, int]:
    """Largest running sum over `events` after `before` -> (bytes, index of the event)."""
    live = live_bytes(before)
    best, index = live, 0
    for position, event in enumerate(events):
        if event.kind != "alloc":
            live -= event.size_bytes
            continue
        live += event.size_bytes
        if live > best:
            best, index = live, position
    return best, index


def live_storages(events: Sequence[Event]) -> list[Event]:
    """The allocations of `events` that none of them frees, in order."""
    live: dict[int, Event] = {}
    for event in events:
        if event.kind == "alloc":
            live[event.storage_id] = event
        elif event.kind == "free":
            live.pop(event.storage_id)
    return list(live.values())


def grouped(live: Sequence[Event]) -> list[LiveBytes]:
    """Live allocations summed by category, module and operation."""
    sums: dict[tuple[str, str, str], list[int]] = {}
    for event in live:
        entry = sums.setdefault((event.category or "temporaries", event.module, event.op), [0, 0])
        entry[0] += event.size_bytes
        entry[1] += 1
    return [LiveBytes(*key, size, count) for key, (size, count) in sums.items()]
