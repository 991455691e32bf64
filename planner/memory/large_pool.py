"""The large pool of the caching allocator, made for speed: many replays of one stream.

The same rules as planner.memory.allocator (a test holds the two against each other on random
streams), for requests above 1 MiB without expandable segments. `_replay.c` does the same thirty
times as fast; where it could not be compiled, the class here answers. Free blocks lie in bins by
exact size, because nearly every request of a training step meets a free block of just its size.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from planner.memory.allocator import LARGE_BUFFER_BYTES, MIN_LARGE_BYTES, ROUND_LARGE_BYTES

try:
    from planner.memory import _replay  # type: ignore[attr-defined]
except ImportError:  # no compiler at installation
    _replay = None

Events = list[tuple[int, int]]
RELEASE, RESET, CAPPED = 1, 2, 4
_MIN_REMAINDER = 1 << 20  # a remainder up to kSmallSize is not split off
_NONE = -1


@dataclass(frozen=True)
class Part:
    """Events of the large pool, the most the small pool holds from each to the next, and what the
    small pool holds at the end."""

    large: Events
    levels: list[int]
    small_bytes: int

    @cached_property
    def packed(self) -> tuple[array[int], array[int]]:
        """Both as int64, for `_replay`."""
        flat = [value for event in self.large for value in event]
        return array("q", flat), array("q", self.levels)


@dataclass(frozen=True, slots=True)
class Counters:
    """What the pool says after a replay; `ok` is False where the cap was too small."""

    ok: bool
    allocated: int
    peak_allocated: int
    reserved: int
    peak_reserved: int


def replay_parts(parts: Sequence[tuple[Part, int]], cap_bytes: int | None) -> Counters:
    """Replay parts in a row, each with flags: RELEASE cached segments after it, RESET the peaks
    before it, hold it to the cap (CAPPED)."""
    if _replay is None:
        return replay_in_python(parts, cap_bytes)
    packed = [(*part.packed, flags) for part, flags in parts]
    return Counters(*_replay.replay(packed, -1 if cap_bytes is None else cap_bytes))


def replay_in_python(parts: Sequence[tuple[Part, int]], cap_bytes: int | None) -> Counters:
    """`replay_parts` without the compiled module."""
    pool = LargePool()
    ok = True
    for part, flags in parts:
        if flags & RESET:
            pool.reset_peaks()
        ok = pool.run(part.large, part.levels, cap_bytes if flags & CAPPED else None)
        if not ok:
            break
        if flags & RELEASE:
            pool.release_cached()
    return Counters(ok, pool.allocated, pool.peak_allocated, pool.reserved, pool.peak_reserved)


class LargePool:
    """Blocks as parallel lists: block i has size, address, neighbours, and whether it is free."""

    __slots__ = (
        "addresses", "allocated", "at", "bins", "frees", "held", "next_address", "nexts",
        "peak_allocated", "peak_reserved", "prevs", "reserved", "size_of", "sizes",
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
        self.allocated = self.reserved = self.next_address = 0
        self.peak_allocated = self.peak_reserved = 0

    def copy(self) -> LargePool:
        """An independent pool in the same state."""
        other = LargePool()
        for name in self.__slots__:
            value = getattr(self, name)
            setattr(other, name, value if isinstance(value, int) else value.copy())
        other.bins = {size: addresses.copy() for size, addresses in self.bins.items()}
        return other

    def reset_peaks(self) -> None:
        """`torch.cuda.reset_peak_memory_stats`."""
        self.peak_allocated, self.peak_reserved = self.allocated, self.reserved

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
                else:
                    kept.append(address)
            self.bins[size] = kept
        self.sizes = [size for size in self.sizes if self.bins[size]]
        self.bins = {size: self.bins[size] for size in self.sizes}

    def run(self, events: Events, small: list[int] | None, cap_bytes: int | None = None) -> bool:
        """Feed (storage, bytes) allocations and (storage, 0) releases; False where the cap is too
        small. `small`: bytes of the small pool at each event, counted into the allocated peak.
        """
        size_of, addresses_of, prevs, nexts = self.size_of, self.addresses, self.prevs, self.nexts
        frees, at, bins, held = self.frees, self.at, self.bins, self.held
        sizes = self.sizes
        allocated, peak = self.allocated, self.peak_allocated
        for position, (key, size) in enumerate(events):
            if not size:
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
                    addresses_of.append(self.next_address)
                    self.next_address += taken
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
            live = allocated + small[position] if small is not None else allocated
            if live > peak:
                peak = live
        self.allocated, self.peak_allocated = allocated, peak
        return True
