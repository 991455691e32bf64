"""The caching allocator on many replays of one stream, as a search for the smallest cap has them.

`_replay.c` has the rules of planner.memory.allocator, without expandable segments, and is a hundred
times as fast (a test holds the two against each other on random streams); where it could not be
compiled, that model answers.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Sequence
from typing import NamedTuple

from planner.memory.allocator import (
    MIN_BLOCK_BYTES,
    ROUND_LARGE_BYTES,
    Block,
    CachingAllocator,
    OutOfMemoryError,
)

try:
    from planner.memory import _replay  # type: ignore[attr-defined]

    if getattr(_replay, "VERSION", 0) != 5:  # built from another source
        _replay = None
except ImportError:  # no compiler at installation
    _replay = None

RELEASE, RESET, CAPPED = 1, 2, 4


class Part(NamedTuple):
    """A stretch of events: i allocates sizes[i] bytes, ~i releases them (int64 arrays).

    base: added to i, so that parts share storages or keep them apart. flags: RELEASE cached
    segments after it, RESET the peaks before it, hold to the cap (CAPPED).
    """

    events: array[int]
    sizes: array[int]
    base: int = 0
    flags: int = 0


class Counters(NamedTuple):
    """What the allocator says after a replay; `ok` is False where the cap was too small."""

    ok: bool
    allocated: int
    peak_allocated: int
    reserved: int
    peak_reserved: int


def replay_parts(parts: Sequence[Part], cap_bytes: int = -1) -> Counters:
    """Replay parts in a row; cap_bytes holds in CAPPED parts (-1: no cap)."""
    if _replay is None:
        return replay_in_python(parts, cap_bytes)
    return Counters(*_replay.replay(parts, cap_bytes))


class Settled(NamedTuple):
    """What loading leaves and the steps after it need. All in bytes.

    allocated, load_peak_allocated: after loading, and its peak; peak_allocated, peak_reserved: of
    the steps without a cap; cap: the smallest under which they complete.
    """

    allocated: int
    load_peak_allocated: int
    peak_allocated: int
    peak_reserved: int
    cap: int


def settle(
    load: Sequence[Part], steps: Sequence[Part], again: Part, times: int, resolution: int
) -> Settled:  # fmt: skip
    """Replay loading and `steps` (all CAPPED, the first with RESET) without a cap, then find the
    smallest: bisected to a part in `resolution`, then as much more as `again`, so many times, wants
    after them: under a tight cap one step may pass and leave too little to the next."""
    if _replay is not None:
        return Settled(*_replay.settle(load, steps, again, times, ROUND_LARGE_BYTES, resolution))
    return settle_in_python(load, steps, again, times, resolution)


def settle_in_python(
    load: Sequence[Part], steps: Sequence[Part], again: Part, times: int, resolution: int
) -> Settled:  # fmt: skip
    """`settle` without the compiled module."""
    loaded = replay_parts(load)
    free = replay_parts([*load, *steps])
    low = max(free.peak_allocated, loaded.reserved)
    low, high = low - 1, max(free.peak_reserved, low)
    last, part = low, max(ROUND_LARGE_BYTES, high // resolution)
    while high - last > part:
        last = (last + high) // 2  # tried last, where all before it fail, as they often do
    if last > low and not replay_parts([*load, *steps], last).ok:
        low = last
    while high - low > max(ROUND_LARGE_BYTES, high // resolution):
        middle = (low + high) // 2
        if replay_parts([*load, *steps], middle).ok:
            high = middle
        else:
            low = middle
    while not replay_parts([*load, *steps, *[again] * times], high).ok:
        high += max(ROUND_LARGE_BYTES, high // resolution)
    return Settled(
        loaded.allocated, loaded.peak_allocated, free.peak_allocated, free.peak_reserved, high,
    )  # fmt: skip


def shifted(
    events: array[int], starts: array[int], shifts: array[int], steps: array[int], times: int = 1
) -> array[int]:
    """Events `times` over, each index i moved by shifts[r], where starts[r] <= i < starts[r + 1],
    and by steps[r] more each time."""
    if _replay is not None:
        return array("q", _replay.shifted(events, starts, shifts, steps, times))
    moved = array("q")
    for turn in range(times):
        for event in events:
            index = event if event >= 0 else ~event
            place = bisect_right(starts, index) - 1
            index += shifts[place] + turn * steps[place]
            moved.append(index if event >= 0 else ~index)
    return moved


def replay_in_python(parts: Sequence[Part], cap_bytes: int = -1) -> Counters:
    """`replay_parts` without the compiled module."""
    allocator, held = CachingAllocator(), dict[int, Block]()
    try:
        for part in parts:
            if part.flags & RESET:
                allocator.reset_peaks()
            capped = part.flags & CAPPED and cap_bytes >= 0
            allocator.cap_bytes = cap_bytes if capped else None
            for event in part.events:
                if event >= 0:
                    size = part.sizes[event] or MIN_BLOCK_BYTES
                    held[part.base + event] = allocator.malloc(size)
                else:
                    allocator.free(held.pop(part.base + ~event))
            if part.flags & RELEASE:
                allocator.empty_cache()
    except OutOfMemoryError:
        return _counters(allocator, False)
    return _counters(allocator, True)


def _counters(allocator: CachingAllocator, ok: bool) -> Counters:
    return Counters(
        ok, allocator.allocated_bytes, allocator.peak_allocated_bytes, allocator.reserved_bytes,
        allocator.peak_reserved_bytes,
    )  # fmt: skip
