"""Streams of allocations through the caching allocator: what it reports, and the smallest cap."""

# Annotations stay objects here: named tuples would compile each string at import.
from collections.abc import Iterable
from typing import NamedTuple

from planner.memory.allocator import (
    LARGE_BUFFER_BYTES,
    ROUND_LARGE_BYTES,
    Block,
    CachingAllocator,
    OutOfMemoryError,
)


class Replay(NamedTuple):
    """What the allocator says after a stream. `ok` is False when the cap was too small."""

    ok: bool
    allocated_bytes: int
    peak_allocated_bytes: int
    reserved_bytes: int
    peak_reserved_bytes: int
    retries: int


EMPTY_CACHE = (-1, 0)
RESET_PEAKS = (-2, 0)


def replay(
    stream: Iterable[tuple[int, int]], *, cap_bytes: int | None = None,
    expandable_segments: bool = False, before: Iterable[tuple[int, int]] = (),
) -> Replay:  # fmt: skip
    """Run a stream of (storage id, bytes): bytes > 0 allocates, 0 frees the id. EMPTY_CACHE and
    RESET_PEAKS stand for the calls of those names. The cap does not hold for `before`."""
    allocator = CachingAllocator(expandable_segments=expandable_segments)
    blocks: dict[int, Block] = {}
    malloc, free = allocator.malloc, allocator.free
    ok = True

    def feed(events: Iterable[tuple[int, int]]) -> None:
        for key, size in events:
            if size:
                blocks[key] = malloc(size)
            elif key >= 0:
                free(blocks.pop(key))
            elif key == -1:
                allocator.empty_cache()
            else:
                allocator.reset_peaks()

    try:
        feed(before)
        allocator.cap_bytes = cap_bytes
        feed(stream)
    except OutOfMemoryError:
        ok = False
    return Replay(
        ok, allocator.allocated_bytes, allocator.peak_allocated_bytes, allocator.reserved_bytes,
        allocator.peak_reserved_bytes, allocator.retries,
    )  # fmt: skip


def smallest_cap(
    stream: Iterable[tuple[int, int]], *, expandable_segments: bool = False,
    resolution_bytes: int = ROUND_LARGE_BYTES, before: Iterable[tuple[int, int]] = (),
) -> int:  # fmt: skip
    """`allocator_required_bytes`: the smallest cap under which the stream completes.

    Bisected between peak allocated and peak reserved, like the measured brackets; exact to
    `resolution_bytes`. `before`: what came before the cap was set.
    """
    events, earlier = list(stream), list(before)

    def run(cap_bytes: int | None) -> Replay:
        return replay(events, cap_bytes=cap_bytes, expandable_segments=expandable_segments,
                      before=[*earlier, RESET_PEAKS])  # fmt: skip

    free = run(None)
    low, high = free.peak_allocated_bytes - 1, free.peak_reserved_bytes
    while not run(high).ok:
        high += LARGE_BUFFER_BYTES  # torch checks a whole segment even where it maps fewer pages
    while high - low > resolution_bytes:
        middle = (low + high) // 2
        if run(middle).ok:
            high = middle
        else:
            low = middle
    return high
