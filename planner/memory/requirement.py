"""What the caching allocator makes of a run: the run's own events, replayed.

The stream is loading, then two optimizer steps: the second has optimizer states, and meets the
layout that the first left. Blocks hold what the allocator does not split off, so what torch reports
as allocated comes from here too.
"""

from __future__ import annotations

from dataclasses import dataclass

from planner.memory.allocator import (
    EMPTY_CACHE,
    LARGE_BUFFER_BYTES,
    MIN_LARGE_BYTES,
    RESET_PEAKS,
    ROUND_LARGE_BYTES,
    SMALL_BUFFER_BYTES,
    SMALL_BYTES,
    CachingAllocator,
    OutOfMemoryError,
    replay,
)
from planner.memory.loading import Events
from planner.memory.program import Program


STEPS = 2


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
    load = program.loading.events
    loaded = replay(load, expandable_segments=expandable_segments)
    steps = step_events(program, workspace_bytes)
    free = replay([*load, RESET_PEAKS, *steps], expandable_segments=expandable_segments)
    required = smallest_sufficient_cap(load, steps, free.peak_allocated_bytes, expandable_segments)
    return Reserve(
        loaded.allocated_bytes, loaded.peak_allocated_bytes, free.peak_allocated_bytes,
        free.peak_reserved_bytes, required,
    )  # fmt: skip


def step_events(program: Program, workspace_bytes: int, steps: int = STEPS) -> Events:
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


def smallest_sufficient_cap(
    load: Events, steps: Events, start_bytes: int, expandable_segments: bool
) -> int:
    """The smallest cap under which the steps complete, from above.

    One pass raises the cap only where an allocation fails after the cached segments are given back;
    a second checks the result, and where an early release had helped the first, widens it.
    """
    cap = _tightest(load, steps, start_bytes, expandable_segments)
    while not _completes(load, steps, cap, expandable_segments):
        cap += max(ROUND_LARGE_BYTES, cap // 400)
    return cap


def _tightest(load: Events, steps: Events, start_bytes: int, expandable_segments: bool) -> int:
    allocator = CachingAllocator(expandable_segments=expandable_segments)
    blocks = _run(allocator, load, {})
    allocator.cap_bytes = start_bytes
    for key, size in steps:
        if not size:
            allocator.free(blocks.pop(key))
            continue
        try:
            blocks[key] = allocator.malloc(size)
        except OutOfMemoryError:
            allocator.cap_bytes = allocator.reserved_bytes + _segment(size, expandable_segments)
            blocks[key] = allocator.malloc(size)
    assert allocator.cap_bytes is not None
    return max(allocator.cap_bytes, allocator.peak_allocated_bytes)


def _segment(size: int, expandable: bool) -> int:
    if size <= SMALL_BYTES:
        return SMALL_BUFFER_BYTES
    if size < MIN_LARGE_BYTES:
        return LARGE_BUFFER_BYTES
    granule = LARGE_BUFFER_BYTES if expandable else ROUND_LARGE_BYTES
    return -(-size // granule) * granule


def _completes(load: Events, steps: Events, cap: int, expandable_segments: bool) -> bool:
    allocator = CachingAllocator(expandable_segments=expandable_segments)
    blocks = _run(allocator, load, {})
    allocator.cap_bytes = cap
    try:
        _run(allocator, steps, blocks)
    except OutOfMemoryError:
        return False
    return True


def _run(allocator: CachingAllocator, events: Events, blocks: dict[int, object]) -> dict[int, object]:
    malloc, free = allocator.malloc, allocator.free
    for key, size in events:
        if size:
            blocks[key] = malloc(size)
        elif key >= 0:
            free(blocks.pop(key))  # type: ignore[arg-type]
        elif (key, size) == EMPTY_CACHE:
            allocator.empty_cache()
    return blocks
