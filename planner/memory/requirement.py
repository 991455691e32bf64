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
    LARGE_BUFFER_BYTES,
    MIN_LARGE_BYTES,
    ROUND_LARGE_BYTES,
    SMALL_BUFFER_BYTES,
    SMALL_BYTES,
    CachingAllocator,
    OutOfMemoryError,
)
from planner.memory.loading import Events
from planner.memory.program import Program

STEPS_TO_PEAK = 2  # the second step has optimizer states
STEPS_TO_SETTLE = 3  # under a cap the layout of a third step still differs from the second's


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
    steps = step_events(program, workspace_bytes, STEPS_TO_PEAK)
    free = _Replay(expandable_segments)
    free.run(load)
    resident, load_peak = free.allocated_bytes, free.peak_allocated_bytes
    free.reset_peaks()
    free.run(steps)
    capped = _Replay(expandable_segments)
    capped.run(load)
    capped.allocator.cap_bytes = max(free.peak_allocated_bytes - free.small_reserved_bytes, 1)
    capped.run(step_events(program, workspace_bytes, STEPS_TO_SETTLE))
    required = capped.allocator.cap_bytes + free.small_reserved_bytes
    return Reserve(
        resident, load_peak, free.peak_allocated_bytes,
        free.allocator.peak_reserved_bytes + free.small_reserved_bytes, required,
    )  # fmt: skip


class _Replay:
    """A replay of the large pool beside the sum of the small one.

    With a cap, an allocation that fails after the cached segments are given back raises the cap by
    just what it lacks: one pass finds the smallest cap, from below.
    """

    def __init__(self, expandable_segments: bool) -> None:
        self.allocator = CachingAllocator(expandable_segments=expandable_segments)
        self.expandable = expandable_segments
        self.peak_allocated_bytes = 0
        self._blocks: dict[int, object] = {}
        self._small: dict[int, int] = {}
        self._small_bytes = self._small_peak = 0

    @property
    def allocated_bytes(self) -> int:
        return self.allocator.allocated_bytes + self._small_bytes

    @property
    def small_reserved_bytes(self) -> int:
        return -(-self._small_peak // SMALL_BUFFER_BYTES) * SMALL_BUFFER_BYTES

    def reset_peaks(self) -> None:
        self.allocator.reset_peaks()
        self.peak_allocated_bytes = self.allocated_bytes

    def run(self, events: Events) -> None:
        """Feed (id, bytes) allocations and (id, 0) releases."""
        allocator, blocks, small = self.allocator, self._blocks, self._small
        malloc, free = allocator.malloc, allocator.free
        small_bytes, small_peak, peak = self._small_bytes, self._small_peak, 0
        for key, size in events:
            if size > SMALL_BYTES:
                try:
                    blocks[key] = malloc(size)
                except OutOfMemoryError:
                    allocator.cap_bytes = allocator.reserved_bytes + self._segment_bytes(size)
                    blocks[key] = malloc(size)
            elif size:
                small[key] = size
                small_bytes += size
                if small_bytes > small_peak:
                    small_peak = small_bytes
            elif key in blocks:
                free(blocks.pop(key))  # type: ignore[arg-type]
                continue
            elif key >= 0:
                small_bytes -= small.pop(key)
                continue
            elif (key, size) == EMPTY_CACHE:
                allocator.empty_cache()
                continue
            live = allocator.allocated_bytes + small_bytes
            if live > peak:
                peak = live
        self._small_bytes, self._small_peak = small_bytes, small_peak
        self.peak_allocated_bytes = max(self.peak_allocated_bytes, peak)

    def _segment_bytes(self, size: int) -> int:
        if self.expandable or size < MIN_LARGE_BYTES:
            return -(-size // LARGE_BUFFER_BYTES) * LARGE_BUFFER_BYTES
        return -(-size // ROUND_LARGE_BYTES) * ROUND_LARGE_BYTES


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
