"""The caching allocator, made for speed: many replays of one stream.

The same rules as planner.memory.allocator (a test holds the two against each other on random
streams), without expandable segments. `_replay.c` does the same thirty times as fast; where it
could not be compiled, `Pools` answers.

The small pool (requests up to 1 MiB) splits to the last 512 bytes, so its blocks are its tensors
and its segments their sum in steps of 2 MiB, nearly: it is summed, and only the large pool is
replayed block by block. Its free blocks lie in bins by exact size, because nearly every request of
a training step meets a free block of just its size.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left, bisect_right, insort
from collections.abc import Sequence
from typing import NamedTuple

from planner.memory.addresses import AddressSpace
from planner.memory.allocator import (
    LARGE_BUFFER_BYTES,
    MIN_LARGE_BYTES,
    ROUND_LARGE_BYTES,
    SMALL_BUFFER_BYTES,
    SMALL_BYTES,
)

try:
    from planner.memory import _replay  # type: ignore[attr-defined]

    if getattr(_replay, "VERSION", 0) != 2:  # built from another source
        _replay = None
except ImportError:  # no compiler at installation
    _replay = None

RELEASE, RESET, CAPPED = 1, 2, 4
_MIN_REMAINDER = 1 << 20  # a remainder up to kSmallSize is not split off
_NONE = -1


class Part(NamedTuple):
    """A stretch of events: i allocates sizes[i] bytes, ~i releases them (int64 arrays).

    base: added to i, so that parts share storages or keep them apart. flags: RELEASE cached
    segments after it, RESET the peaks before it, hold the large pool to the cap (CAPPED).
    """

    events: array[int]
    sizes: array[int]
    base: int = 0
    flags: int = 0


class Counters(NamedTuple):
    """What the allocator says after a replay; `ok` is False where the cap was too small.

    allocated counts both pools, reserved the large one, small the small pool's tensors.
    """

    ok: bool
    allocated: int
    peak_allocated: int
    reserved: int
    peak_reserved: int
    small: int
    small_peak: int


def replay_parts(parts: Sequence[Part], cap_bytes: int = -1) -> Counters:
    """Replay parts in a row; cap_bytes holds for the large pool in CAPPED parts (-1: no cap)."""
    if _replay is None:
        return replay_in_python(parts, cap_bytes)
    return Counters(*_replay.replay(parts, cap_bytes))


class Settled(NamedTuple):
    """What loading leaves and the steps after it need. All in bytes.

    allocated, load_peak_allocated: after loading, and its peak; peak_allocated, peak_reserved,
    small_peak: of loading and steps without a cap, as in Counters, the first two from the steps
    on; cap: the smallest on the large pool under which the steps complete.
    """

    allocated: int
    load_peak_allocated: int
    peak_allocated: int
    peak_reserved: int
    small_peak: int
    cap: int


def settle(
    load: Sequence[Part], steps: Sequence[Part], again: Part, resolution: int
) -> Settled:  # fmt: skip
    """Replay loading and `steps` (all CAPPED, the first with RESET) without a cap, then find the
    smallest: bisected to a part in `resolution`, then as much more as `again` wants after them."""
    if _replay is not None:
        return Settled(*_replay.settle(
            load, steps, again, SMALL_BUFFER_BYTES, ROUND_LARGE_BYTES, resolution
        ))  # fmt: skip
    return settle_in_python(load, steps, again, resolution)


def settle_in_python(
    load: Sequence[Part], steps: Sequence[Part], again: Part, resolution: int
) -> Settled:  # fmt: skip
    """`settle` without the compiled module."""
    loaded = replay_parts(load)
    free = replay_parts([*load, *steps])
    small = -(-free.small_peak // SMALL_BUFFER_BYTES) * SMALL_BUFFER_BYTES
    low = max(free.peak_allocated - small, loaded.reserved)
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
    while not replay_parts([*load, *steps, again], high).ok:
        high += max(ROUND_LARGE_BYTES, high // resolution)
    return Settled(
        loaded.allocated, loaded.peak_allocated, free.peak_allocated, free.peak_reserved,
        free.small_peak, high,
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
    pools = Pools()
    ok = True
    for part in parts:
        if part.flags & RESET:
            pools.reset_peaks()
        ok = pools.run(part, cap_bytes if part.flags & CAPPED and cap_bytes >= 0 else None)
        if not ok:
            break
        if part.flags & RELEASE:
            pools.release_cached()
    return Counters(
        ok, pools.allocated + pools.small, pools.peak_allocated, pools.reserved,
        pools.peak_reserved, pools.small, pools.small_peak,
    )  # fmt: skip


class Pools:
    """Blocks as parallel lists: block i has size, address, neighbours, and whether it is free."""

    __slots__ = (
        "addresses", "allocated", "at", "bins", "frees", "held", "nexts", "peak_allocated",
        "peak_reserved", "prevs", "reserved", "size_of", "sizes", "small", "small_peak", "space",
    )  # fmt: skip

    def __init__(self) -> None:
        self.size_of: list[int] = []
        self.addresses: list[int] = []
        self.prevs: list[int] = []
        self.nexts: list[int] = []
        self.frees: list[bool] = []
        self.at: dict[int, int] = {}  # address of a free block -> block
        self.bins: dict[int, list[int]] = {}  # size -> addresses, ascending
        self.sizes: list[int] = []  # keys of `bins`, ascending; a bin may be empty
        self.held: dict[int, int] = {}  # storage -> block
        self.space = AddressSpace()
        self.allocated = self.reserved = 0
        self.peak_allocated = self.peak_reserved = self.small = self.small_peak = 0

    def reset_peaks(self) -> None:
        """`torch.cuda.reset_peak_memory_stats`."""
        self.peak_allocated, self.peak_reserved = self.allocated + self.small, self.reserved

    def release_cached(self) -> None:
        """Segments that are free in whole go back to the driver."""
        for size, addresses in self.bins.items():
            kept = []
            for address in addresses:
                block = self.at[address]
                if self.prevs[block] == _NONE and self.nexts[block] == _NONE:
                    del self.at[address]
                    self.frees[block] = False
                    self.reserved -= size
                    self.space.give(address, size)
                else:
                    kept.append(address)
            self.bins[size] = kept
        self.sizes = [size for size in self.sizes if self.bins[size]]
        self.bins = {size: self.bins[size] for size in self.sizes}

    def run(self, part: Part, cap_bytes: int | None = None) -> bool:
        """Feed a part's allocations and releases; False where the cap is too small."""
        size_of, addresses_of, prevs, nexts = self.size_of, self.addresses, self.prevs, self.nexts
        frees, at, bins, held = self.frees, self.at, self.bins, self.held
        sizes = self.sizes
        allocated, peak = self.allocated, self.peak_allocated
        small, base, bytes_of = self.small, part.base, part.sizes
        for index in part.events:
            key = base + (index if index >= 0 else ~index)
            size = bytes_of[index if index >= 0 else ~index]
            if size <= SMALL_BYTES:
                small += size if index >= 0 else -size
                if small > self.small_peak:
                    self.small_peak = small
                if allocated + small > peak:
                    peak = allocated + small
                continue
            if index < 0:
                block = held.pop(key)
                size = size_of[block]
                allocated -= size
                address = addresses_of[block]
                before, after = prevs[block], nexts[block]
                if before >= 0 and frees[before]:
                    first = addresses_of[before]
                    bins[size_of[before]].remove(first)
                    del at[first]
                    frees[before] = False
                    size += size_of[before]
                    address = first
                    before = prevs[before]
                    prevs[block] = before
                    if before >= 0:
                        nexts[before] = block
                if after >= 0 and frees[after]:
                    other = addresses_of[after]
                    bins[size_of[after]].remove(other)
                    del at[other]
                    frees[after] = False
                    size += size_of[after]
                    after = nexts[after]
                    nexts[block] = after
                    if after >= 0:
                        prevs[after] = block
                size_of[block] = size
                addresses_of[block] = address
                frees[block] = True
                at[address] = block
                bin_ = bins.get(size)
                if bin_ is None:
                    bins[size] = [address]
                    insort(sizes, size)
                elif bin_:
                    insort(bin_, address)
                else:
                    bin_.append(address)
                continue
            bin_ = bins.get(size)
            if bin_:
                block = at.pop(bin_.pop(0))
                frees[block] = False
                taken = size
            else:
                place = bisect_left(sizes, size)
                while place < len(sizes) and not bins[sizes[place]]:
                    del bins[sizes.pop(place)]
                if place < len(sizes):
                    taken = sizes[place]
                    block = at.pop(bins[taken].pop(0))
                    frees[block] = False
                else:
                    granule = ROUND_LARGE_BYTES
                    taken = -(-size // granule) * granule
                    if size < MIN_LARGE_BYTES:
                        taken = LARGE_BUFFER_BYTES
                    if cap_bytes is not None and self.reserved + taken > cap_bytes:
                        self.release_cached()
                        bins, sizes = self.bins, self.sizes
                        if self.reserved + taken > cap_bytes:
                            return False
                    self.reserved += taken
                    if self.reserved > self.peak_reserved:
                        self.peak_reserved = self.reserved
                    block = len(size_of)
                    size_of.append(taken)
                    addresses_of.append(self.space.take(taken))
                    prevs.append(_NONE)
                    nexts.append(_NONE)
                    frees.append(False)
                rest = taken - size
                if rest > _MIN_REMAINDER:
                    new = len(size_of)
                    address = addresses_of[block] + size
                    size_of.append(rest)
                    addresses_of.append(address)
                    prevs.append(block)
                    after = nexts[block]
                    nexts.append(after)
                    if after >= 0:
                        prevs[after] = new
                    nexts[block] = new
                    frees.append(True)
                    at[address] = new
                    size_of[block] = taken = size
                    bin_ = bins.get(rest)
                    if bin_ is None:
                        bins[rest] = [address]
                        insort(sizes, rest)
                    else:
                        insort(bin_, address)
            held[key] = block
            allocated += taken
            if allocated + small > peak:
                peak = allocated + small
        self.allocated, self.peak_allocated, self.small = allocated, peak, small
        return True
