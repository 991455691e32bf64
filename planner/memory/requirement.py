"""What the caching allocator makes of a run: the run's own events, replayed.

The stream is loading, then optimizer steps in a row: from the second on there are optimizer states,
and each step meets the layout that the one before it left. Blocks hold what the allocator does not
split off, so what torch reports as allocated comes from here too.
"""

# Annotations stay objects here: named tuples would compile each string at import.
from array import array
from typing import NamedTuple

from planner.memory.allocator import LARGE_BUFFER_BYTES
from planner.memory.expandable import expandable_replay
from planner.memory.loaded import Loaded
from planner.memory.loading import Loading
from planner.memory.pools import CAPPED, RELEASE, RESET, Part, settle
from planner.memory.program import Program
from planner.memory.storage import Recorder

RESOLUTION = 400  # the smallest cap is sought to a part in so many
# Steps beside the first under one cap, and what must pass after them: a step may pass that leaves
# too little to the next.
_LATER, _AGAIN = 1, 2


class Reserve(NamedTuple):
    """Bytes as torch's counters would say them, loading apart in the peaks.

    required_bytes: the smallest cap under which the steps complete.
    """

    resident_bytes: int
    load_peak_bytes: int
    peak_allocated_bytes: int
    peak_reserved_bytes: int
    required_bytes: int


def reserve(
    program: Program, workspace_bytes: int, expandable_segments: bool,
    evaluation: Recorder | None = None,
) -> Reserve:  # fmt: skip
    """Replay the run without a cap, then find the smallest cap; `evaluation`: a batch of it after
    the steps, in which the cap must hold, too (the peaks are those of training)."""
    load = loading_parts(program)
    first, later = step_parts(program, workspace_bytes)
    run = [*first, *[later] * _LATER]
    found = _reserve(load, run, expandable_segments)
    if evaluation is None:
        return found
    taken = [part.base + len(part.sizes) for part in first]
    batch = Part(array("q", evaluation.events), array("q", evaluation.sizes), max(taken))
    both = _reserve(load, [*run, batch], expandable_segments)
    return found._replace(required_bytes=max(found.required_bytes, both.required_bytes))


def _reserve(load: list[Part], run: list[Part], expandable_segments: bool) -> Reserve:
    if expandable_segments:
        return _expandable([*load, *run])
    steps = [part._replace(flags=CAPPED) for part in run]  # the second has states
    steps[0] = steps[0]._replace(flags=CAPPED | RESET)
    found = settle(load, steps, steps[-1], _AGAIN, RESOLUTION)
    return Reserve(
        found.allocated, found.load_peak_allocated, found.peak_allocated, found.peak_reserved,
        found.cap,
    )  # fmt: skip


def loading_parts(program: Program) -> list[Part]:
    """Loading, k-bit preparation and adapters."""
    return _loading_parts(program.loading)


def loading_parts_of(loaded: Loaded) -> list[Part]:
    """The same, of a model that is not run."""
    return _loading_parts(Loading(loaded))


def _loading_parts(loading: Loading) -> list[Part]:
    return [Part(events, loading.sizes, 0, RELEASE) for events in loading.parts]


def step_parts(program: Program, workspace_bytes: int) -> tuple[list[Part], Part]:
    """The first optimizer step in parts, and any later one.

    A workspace comes with the first product of each thread, after its output: the forward's, and
    autograd's; optimizer states with the optimizer's first step, gradients still there. Nothing
    else of a step outlives it, so the storages of later steps take the same places.
    """
    recorder = program.recorder
    events = array("q", recorder.events)
    sizes = array("q", recorder.sizes)
    starts = {instant.name: instant.start for instant in reversed(recorder.instants)}
    base = len(program.loading.sizes)
    stays = base + len(sizes)
    states = array("q", program.states.tensors)
    workspace = array("q", [workspace_bytes])
    forward = _first_product(program, starts["forward"])
    backward = _first_product(program, starts["backward"])
    optimizer = starts["optimizer step"]
    first = [
        Part(events[:forward], sizes, base),
        Part(array("q", [0]), workspace, stays),
        Part(events[forward:backward], sizes, base),
        Part(array("q", [0]), workspace, stays + 1),
        Part(events[backward:optimizer], sizes, base),
        Part(array("q", range(len(states))), states, stays + 2),
        Part(events[optimizer:], sizes, base),
    ]
    return first, Part(events, sizes, base)


def _first_product(program: Program, start: int) -> int:
    """The event after the first matrix product's output."""
    recorder = program.recorder
    for position in range(start, len(recorder.events)):
        index = recorder.events[position]
        if index >= 0 and recorder.blocks[index].op.partition(" ")[0] in ("mm", "bmm"):
            return position + 1
    return start


def _expandable(parts: list[Part]) -> Reserve:
    """With expandable segments, by the general model: the cap holds from the start."""
    load = [part for part in parts if part.flags & RELEASE]
    steps = [part for part in parts if not part.flags & RELEASE]
    steps[0] = steps[0]._replace(flags=RESET)
    loaded = expandable_replay(load)(-1)
    replay = expandable_replay([*load, *steps])
    free = replay(-1)
    low, high = free.peak_allocated - 1, free.peak_reserved
    while not replay(high).ok:
        high += LARGE_BUFFER_BYTES  # torch checks a whole segment even where it maps fewer pages
    while high - low > free.peak_reserved // RESOLUTION:
        middle = (low + high) // 2
        if replay(middle).ok:
            high = middle
        else:
            low = middle
    return Reserve(
        loaded.allocated, loaded.peak_allocated, free.peak_allocated, free.peak_reserved, high
    )  # fmt: skip
