"""What the caching allocator makes of a run: the run's own events, replayed.

The stream is loading, then optimizer steps in a row: from the second on there are optimizer states,
and each step meets the layout that the one before it left. Blocks hold what the allocator does not
split off, so what torch reports as allocated comes from here too.

The small pool (requests up to 1 MiB) splits to the last 512 bytes, so its blocks are its tensors
and its segments their sum in steps of 2 MiB, nearly: it is summed, and only the large pool is
replayed block by block.
"""

from __future__ import annotations

from dataclasses import dataclass

from planner.memory.allocator import ROUND_LARGE_BYTES, SMALL_BUFFER_BYTES, SMALL_BYTES
from planner.memory.large_pool import CAPPED, RELEASE, RESET, Part, replay_parts
from planner.memory.loading import Events
from planner.memory.program import Program
from planner.memory.replay import EMPTY_CACHE, RESET_PEAKS, replay, smallest_cap
from planner.memory.storage import BLOCK_BYTES

STEPS_TO_PEAK = 2  # the second step has optimizer states
STEPS_TO_SETTLE = 3  # under a cap the layout of a third step still differs from the second's
RESOLUTION = 400  # the smallest cap is sought to a part in so many


@dataclass(frozen=True, slots=True)
class Reserve:
    """Bytes as torch's counters would say them, loading apart in the peaks.

    required_bytes: the smallest cap under which the steps complete.
    """

    resident_bytes: int
    load_peak_bytes: int
    peak_allocated_bytes: int
    peak_reserved_bytes: int
    required_bytes: int


def reserve(program: Program, workspace_bytes: int, expandable_segments: bool) -> Reserve:
    """Replay the run without a cap, then find the smallest cap."""
    if expandable_segments:
        return _expandable(program, workspace_bytes)
    loading = _split(program.loading.events)
    small = loading[-1].small_bytes
    first = _split(first_step(program, workspace_bytes), small)[0]
    later = _split(later_step(program), first.small_bytes)[0]
    load = [(part, RELEASE) for part in loading]
    loaded = replay_parts(load, None)
    free = replay_parts([*load, (first, RESET), (later, 0)], None)
    small_peak = max(*first.levels, *later.levels, small)
    small_reserved = -(-small_peak // SMALL_BUFFER_BYTES) * SMALL_BUFFER_BYTES
    low = max(free.peak_allocated - small_reserved, loaded.reserved)
    cap = _smallest_cap(load, first, later, low, free.peak_reserved)
    return Reserve(
        loaded.allocated + small, loaded.peak_allocated, free.peak_allocated,
        free.peak_reserved + small_reserved, cap + small_reserved,
    )  # fmt: skip


def _smallest_cap(
    load: list[tuple[Part, int]], first: Part, later: Part, low: int, high: int
) -> int:
    """Bisected over two steps; then as much more as a third step wants."""

    def completes(cap: int, steps: int) -> bool:
        parts = [*load, (first, CAPPED), *[(later, CAPPED)] * (steps - 1)]
        return replay_parts(parts, cap).ok

    low, high = low - 1, max(high, low)
    while high - low > max(ROUND_LARGE_BYTES, high // RESOLUTION):
        middle = (low + high) // 2
        if completes(middle, STEPS_TO_PEAK):
            high = middle
        else:
            low = middle
    while not completes(high, STEPS_TO_SETTLE):
        high += max(ROUND_LARGE_BYTES, high // RESOLUTION)
    return high


def _split(events: Events, small: int = 0) -> list[Part]:
    """The parts between emptied caches. `small`: what the small pool holds at the start."""
    parts: list[Part] = []
    large: Events = []
    levels: list[int] = []
    sizes: dict[int, int] = {}
    for key, size in events:
        if size > SMALL_BYTES:
            large.append((key, size))
            levels.append(small)
        elif size:
            sizes[key] = size
            small += size
            if levels and small > levels[-1]:
                levels[-1] = small
        elif key in sizes:
            small -= sizes.pop(key)
        elif (key, size) == EMPTY_CACHE:
            parts.append(Part(large, levels, small))
            large, levels = [], []
        else:
            large.append((key, 0))
            levels.append(small)
    parts.append(Part(large, levels, small))
    return parts


def _expandable(program: Program, workspace_bytes: int) -> Reserve:
    load = program.loading.events
    loaded = replay(load, expandable_segments=True)
    stream = [*load, RESET_PEAKS, *first_step(program, workspace_bytes), *later_step(program)]
    free = replay(stream, expandable_segments=True)
    required = smallest_cap(
        stream, expandable_segments=True, resolution_bytes=free.peak_reserved_bytes // RESOLUTION
    )
    return Reserve(
        loaded.allocated_bytes, loaded.peak_allocated_bytes, free.peak_allocated_bytes,
        free.peak_reserved_bytes, required,
    )  # fmt: skip


def first_step(program: Program, workspace_bytes: int) -> Events:
    """The first optimizer step. A workspace comes with the first product of each thread, after its
    output: the forward's, and autograd's; optimizer states with the optimizer's, gradients still
    there."""
    recorder = program.recorder
    starts = {instant.name: instant.start for instant in reversed(recorder.instants)}
    optimizer = starts["optimizer step"]
    forward = _first_product(program, starts["forward"])
    backward = _first_product(program, starts["backward"])
    base = len(program.loading.events)  # ids of loading are below
    events = _events(program, base)
    stays = base + len(recorder.blocks)
    states = [(stays + 2 + index, size) for index, size in enumerate(program.states.tensors)]
    return [
        *events[:forward], (stays, workspace_bytes), *events[forward:backward],
        (stays + 1, workspace_bytes), *events[backward:optimizer], *states, *events[optimizer:],
    ]  # fmt: skip


def _first_product(program: Program, start: int) -> int:
    """The event after the first matrix product's output."""
    recorder = program.recorder
    for position in range(start, len(recorder.events)):
        index = recorder.events[position]
        if index >= 0 and recorder.blocks[index].op.partition(" ")[0] in ("mm", "bmm"):
            return position + 1
    return start


def later_step(program: Program) -> Events:
    """Every further step: the recorded events. Nothing of a step outlives it, so ids come again."""
    return _events(program, len(program.loading.events))


def _events(program: Program, base: int) -> Events:
    sizes = [block.nbytes or BLOCK_BYTES for block in program.recorder.blocks]
    return [(base + i, sizes[i]) if i >= 0 else (base + ~i, 0) for i in program.recorder.events]
