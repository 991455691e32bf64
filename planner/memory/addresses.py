"""Where the driver puts segments. The allocator takes the free block of lowest address among those
of one size, so addresses decide which hole a tensor falls into.

Read off allocator histories of real steps (H200, driver 580, torch 2.11): segments lie in ranges of
whole 32 MiB; each new range goes below all others, into the highest gap that holds it, aligned to
its size where that is a power of two; what a range has left serves later small segments, the lowest
range first. A range whose segments are all given back is a gap again.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort

RANGE_BYTES = 32 << 20
_TOP = 1 << 60  # above any run, the one that nothing holds too

Stretch = tuple[int, int]  # (address, size)


class AddressSpace:
    """Addresses for segments. `left`: free stretches inside ranges; `gaps`: between ranges. All
    lists ascend."""

    __slots__ = ("gaps", "left", "low", "ranges")

    def __init__(self) -> None:
        self.low = _TOP
        self.gaps: list[Stretch] = []
        self.left: list[Stretch] = []
        self.ranges: list[Stretch] = []

    def take(self, size: int) -> int:
        """The address of a new segment."""
        for place, (address, room) in enumerate(self.left):
            if room >= size:
                self.left[place : place + 1] = [(address + size, room - size)][: room > size]
                return address
        whole = -(-size // RANGE_BYTES) * RANGE_BYTES
        address = self._take_range(whole)
        insort(self.ranges, (address, whole))
        if whole > size:
            insort(self.left, (address + size, whole - size))
        return address

    def give(self, address: int, size: int) -> None:
        """A segment is gone."""
        place = bisect_right(self.ranges, (address, _TOP)) - 1
        start, whole = self.ranges[place]
        stretch = _join(self.left, (address, size), start, start + whole)
        if stretch == (start, whole):
            del self.ranges[place]
            _join(self.gaps, stretch, 0, _TOP)
            self.left.remove(stretch)

    def _take_range(self, whole: int) -> int:
        step = RANGE_BYTES if whole & (whole - 1) else whole
        for place in range(len(self.gaps) - 1, -1, -1):
            start, room = self.gaps[place]
            address = (start + room - whole) // step * step
            if address >= start:
                after = start + room - address - whole
                parts = [(start, address - start), (address + whole, after)]
                self.gaps[place : place + 1] = [part for part in parts if part[1]]
                return address
        address = (self.low - whole) // step * step
        if address + whole < self.low:
            insort(self.gaps, (address + whole, self.low - address - whole))
        self.low = address
        return address


def _join(free: list[Stretch], stretch: Stretch, low: int, high: int) -> Stretch:
    """Add a stretch to `free`, one with its free neighbours between `low` and `high`."""
    address, size = stretch
    place = bisect_left(free, stretch)
    if place < len(free) and free[place][0] == address + size < high:
        size += free.pop(place)[1]
    if place and address > low and sum(free[place - 1]) == address:
        before = free.pop(place - 1)
        address, size = before[0], before[1] + size
    insort(free, (address, size))
    return address, size
