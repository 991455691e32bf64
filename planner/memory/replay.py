"""Streams of allocations through the caching allocator: what it reports, and the smallest cap."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from planner.memory.allocator import (
    LARGE_BUFFER_BYTES,
    ROUND_LARGE_BYTES,
    Block,
    CachingAllocator,
    OutOfMemoryError,
)


@dataclass(frozen=True, slots=True)
class Replay:
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
    expandable_segments: bool = False,
) -> Replay:  # fmt: skip
    """Run a stream of (storage id, bytes): bytes > 0 allocates, 0 frees the id. EMPTY_CACHE and
    RESET_PEAKS stand for the calls of those names."""
    allocator = CachingAllocator(cap_bytes, expandable_segments=expandable_segments)
    blocks: dict[int, Block] = {}
    malloc, free = allocator.malloc, allocator.free
    ok = True
    try:
        for key, size in stream:
            if size:
                blocks[key] = malloc(size)
            elif key >= 0:
                free(blocks.pop(key))
            elif key == -1:
                allocator.empty_cache()
            else:
                allocator.reset_peaks()
    except OutOfMemoryError:
        ok = False
    return Replay(
        ok, allocator.allocated_bytes, allocator.peak_allocated_bytes, allocator.reserved_bytes,
        allocator.peak_reserved_bytes, allocator.retries,
    )  # fmt: skip


def smallest_cap(
    stream: Iterable[tuple[int, int]], *, expandable_segments: bool = False,
    resolution_bytes: int = ROUND_LARGE_BYTES,
) -> int:  # fmt: skip
    """`allocator_required_bytes`: the smallest cap under which the stream completes.

    Bisected between peak allocated and peak reserved, like the measured brackets; exact to
    `resolution_bytes`.
    """
    events = list(stream)
    free = replay(events, expandable_segments=expandable_segments)
    low, high = free.peak_allocated_bytes - 1, free.peak_reserved_bytes
    while not replay(events, cap_bytes=high, expandable_segments=expandable_segments).ok:
        high += LARGE_BUFFER_BYTES  # torch checks a whole segment even where it maps fewer pages
    while high - low > resolution_bytes:
        middle = (low + high) // 2
        if replay(events, cap_bytes=middle, expandable_segments=expandable_segments).ok:
            high = middle
        else:
            low = middle
    return high
