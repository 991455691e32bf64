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

from planner.memory.allocator import (
    EMPTY_CACHE,
    RESET_PEAKS,
    ROUND_LARGE_BYTES,
    SMALL_BUFFER_BYTES,
    SMALL_BYTES,
    replay,
    smallest_cap,
)
from planner.memory.large_pool import LargePool
from planner.memory.loading import Events
from planner.memory.program import Program

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
    pool = LargePool()
    small = 0
    for large, levels, small in loading:
        pool.run(large, levels)
        pool.release_cached()
    resident, load_peak = pool.allocated + small, pool.peak_allocated
    pool.reset_peaks()
    steps = _split(step_events(program, workspace_bytes, STEPS_TO_SETTLE), small)[0]
    two = _first_steps(program, steps[0], STEPS_TO_PEAK)
    free = pool.copy()
    free.peak_allocated = pool.allocated + small
    free.run(two, steps[1])
    small_reserved = -(-max(steps[1], default=small) // SMALL_BUFFER_BYTES) * SMALL_BUFFER_BYTES
    low = free.peak_allocated - small_reserved
    cap = _smallest_cap(pool, two, steps[0], low, free.peak_reserved)
    return Reserve(
        resident, load_peak, free.peak_allocated, free.peak_reserved + small_reserved,
        cap + small_reserved,
    )  # fmt: skip


def _smallest_cap(pool: LargePool, two: Events, settled: Events, low: int, high: int) -> int:
    """Bisected over two steps; then as much more as a third step wants."""
    floor = pool.reserved
    low, high = max(low - 1, floor - 1), max(high, floor)
    while high - low > max(ROUND_LARGE_BYTES, high // RESOLUTION):
        middle = (low + high) // 2
        if pool.copy().run(two, None, middle):
            high = middle
        else:
            low = middle
    while not pool.copy().run(settled, None, high):
        high += max(ROUND_LARGE_BYTES, high // RESOLUTION)
    return high


def _split(events: Events, small: int = 0) -> list[tuple[Events, list[int], int]]:
    """Parts between emptied caches: large events, the most the small pool holds from each to the
    next, and what it holds at the end."""
    parts: list[tuple[Events, list[int], int]] = []
    large: Events = []
    levels: list[int] = []
    sizes: dict[int, int] = {}
    held: set[int] = set()
    for key, size in events:
        if size > SMALL_BYTES:
            large.append((key, size))
            levels.append(small)
            held.add(key)
        elif size:
            sizes[key] = size
            small += size
            if levels and small > levels[-1]:
                levels[-1] = small
        elif key in sizes:
            small -= sizes.pop(key)
        elif (key, size) == EMPTY_CACHE:
            parts.append((large, levels, small))
            large, levels = [], []
        else:
            large.append((key, 0))
            levels.append(small)
    parts.append((large, levels, small))
    return parts


def _first_steps(program: Program, large: Events, steps: int) -> Events:
    """The large events of the first `steps` of STEPS_TO_SETTLE steps."""
    sizes = [block.nbytes for block in program.recorder.blocks]
    per_step = sum(
        sizes[index if index >= 0 else ~index] > SMALL_BYTES for index in program.recorder.events
    )
    return large[: len(large) - (STEPS_TO_SETTLE - steps) * per_step]


def _expandable(program: Program, workspace_bytes: int) -> Reserve:
    load = program.loading.events
    steps = step_events(program, workspace_bytes, STEPS_TO_PEAK)
    loaded = replay(load, expandable_segments=True)
    stream = [*load, RESET_PEAKS, *steps]
    free = replay(stream, expandable_segments=True)
    required = smallest_cap(
        stream, expandable_segments=True, resolution_bytes=free.peak_reserved_bytes // RESOLUTION
    )
    return Reserve(
        loaded.allocated_bytes, loaded.peak_allocated_bytes, free.peak_allocated_bytes,
        free.peak_reserved_bytes, required,
    )  # fmt: skip


def step_events(program: Program, workspace_bytes: int, steps: int) -> Events:
    """Optimizer steps in a row. A workspace comes with the first product of each thread: the
    forward's, and autograd's; optimizer states in the first optimizer step, gradients still there.
    """
    recorder = program.recorder
    sizes = [block.nbytes for block in recorder.blocks]
    starts = {instant.name: instant.start for instant in reversed(recorder.instants)}
    backward, optimizer = starts["backward"], starts["optimizer step"]
    key = len(program.loading.events)  # ids of loading are below
    events: Events = [(key, workspace_bytes)]
    base = key + 2
    events += _shifted(recorder.events[:backward], sizes, base)
    events.append((key + 1, workspace_bytes))
    events += _shifted(recorder.events[backward:optimizer], sizes, base)
    states = base + len(sizes)
    events += [(states + index, size) for index, size in enumerate(program.states.tensors)]
    events += _shifted(recorder.events[optimizer:], sizes, base)
    base = states + len(program.states.tensors)
    for _ in range(steps - 1):
        events += _shifted(recorder.events, sizes, base)
        base += len(sizes)
    return events


def _shifted(events: list[int], sizes: list[int], base: int) -> Events:
    return [(base + i, sizes[i]) if i >= 0 else (base + ~i, 0) for i in events
            if sizes[i if i >= 0 else ~i]]  # fmt: skip
