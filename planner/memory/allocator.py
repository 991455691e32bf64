"""torch's CUDA caching allocator (c10/cuda/CUDACachingAllocator.cpp, torch 2.11), in plain Python.

It turns a stream of allocations and releases into what `torch.cuda` reports: allocated bytes (whole
blocks, with the remainders it does not split off) and reserved bytes, under a cap or without.
One stream, default configuration or expandable segments. Left out: max_split_size, power-of-two
rounding, garbage collection, private pools.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable

from planner.errors import VramwiseError
from planner.memory.addresses import AddressSpace

MIN_BLOCK_BYTES = 512  # kMinBlockSize: every size is a multiple of it
SMALL_BYTES = 1 << 20  # kSmallSize: the largest request of the small pool
SMALL_BUFFER_BYTES = 2 << 20  # kSmallBuffer: a segment of the small pool
LARGE_BUFFER_BYTES = 20 << 20  # kLargeBuffer: a segment for requests below kMinLargeAlloc
MIN_LARGE_BYTES = 10 << 20  # kMinLargeAlloc
ROUND_LARGE_BYTES = 2 << 20  # kRoundLarge
_ADDRESS_BITS = 60
_ADDRESS_MASK = (1 << _ADDRESS_BITS) - 1
_EXPANDABLE_SPACE = LARGE_BUFFER_BYTES << 19  # of addresses, 10 TiB: more than any card


class OutOfMemoryError(VramwiseError):
    """The cap does not hold the next segment, even after cached segments are given back."""


class Block:
    """A stretch of a segment. `prev` and `next` are its neighbours by address."""

    __slots__ = ("address", "allocated", "mapped", "next", "pool", "prev", "size")

    def __init__(self, address: int, size: int, pool: _Pool) -> None:
        self.address = address
        self.size = size
        self.pool = pool
        self.prev: Block | None = None
        self.next: Block | None = None
        self.allocated = False
        self.mapped = True

    @property
    def is_large(self) -> bool:
        """Whether it is of the large pool."""
        return self.pool.segment_bytes == LARGE_BUFFER_BYTES


class _Pool:
    """Free blocks ordered by (size, address), both in one integer."""

    __slots__ = ("blocks", "keys", "min_remainder", "segment_bytes", "unmapped")

    def __init__(self, segment_bytes: int, min_remainder: int) -> None:
        self.keys: list[int] = []
        self.blocks: dict[int, Block] = {}
        self.segment_bytes = segment_bytes
        self.min_remainder = min_remainder
        self.unmapped: list[Block] = []

    def insert(self, block: Block) -> None:
        key = block.size << _ADDRESS_BITS | block.address
        insort(self.keys, key)
        self.blocks[key] = block

    def remove(self, block: Block) -> None:
        key = block.size << _ADDRESS_BITS | block.address
        del self.keys[bisect_left(self.keys, key)]
        del self.blocks[key]


class CachingAllocator:
    """`malloc` and `free` as torch would, with its statistics.

    cap_bytes: the limit of `set_per_process_memory_fraction` in bytes (None: no limit).
    """

    def __init__(self, cap_bytes: int | None = None, *, expandable_segments: bool = False) -> None:
        self.cap_bytes = cap_bytes
        self.expandable = expandable_segments
        least = MIN_BLOCK_BYTES if expandable_segments else SMALL_BYTES + 1
        self._small = _Pool(SMALL_BUFFER_BYTES, MIN_BLOCK_BYTES)
        self._large = _Pool(LARGE_BUFFER_BYTES, least)
        self._space = AddressSpace()
        self._next_address = ROUND_LARGE_BYTES  # of expandable segments
        self.allocated_bytes = self.peak_allocated_bytes = 0
        self.reserved_bytes = self.peak_reserved_bytes = 0
        self.retries = 0

    def malloc(self, size_bytes: int) -> Block:
        """A block of at least `size_bytes`; raises OutOfMemoryError when the cap forbids it."""
        size = max(-(-size_bytes // MIN_BLOCK_BYTES) * MIN_BLOCK_BYTES, MIN_BLOCK_BYTES)
        pool = self._small if size <= SMALL_BYTES else self._large
        block = self._cached(pool, size) or self._new(pool, size)
        if block is None:
            self.retries += 1
            self.empty_cache()
            block = self._new(pool, size)
        if block is None:
            raise OutOfMemoryError(
                f"{size} bytes do not fit: {self.reserved_bytes} reserved, cap {self.cap_bytes}"
            )
        if block.size - size >= pool.min_remainder:
            self._split(block, size)
        block.allocated = True
        self.allocated_bytes += block.size
        if self.allocated_bytes > self.peak_allocated_bytes:
            self.peak_allocated_bytes = self.allocated_bytes
        return block

    def free(self, block: Block) -> None:
        """Back to its pool, merged with free neighbours."""
        self.allocated_bytes -= block.size
        block.allocated = False
        pool = block.pool
        self._merge_neighbours(block, pool)
        pool.insert(block)

    def empty_cache(self) -> None:
        """`torch.cuda.empty_cache`: segments that are free in whole go back to the driver."""
        for pool in (self._large, self._small):
            for block in list(pool.blocks.values()):
                if self.expandable:
                    self._unmap(block, pool)
                elif block.prev is None and block.next is None:
                    pool.remove(block)
                    self.reserved_bytes -= block.size
                    self._space.give(block.address, block.size)

    def reset_peaks(self) -> None:
        """`torch.cuda.reset_peak_memory_stats`."""
        self.peak_allocated_bytes = self.allocated_bytes
        self.peak_reserved_bytes = self.reserved_bytes

    def segments(self, held: Iterable[Block]) -> list[list[Block]]:
        """The blocks of every segment by address (an expandable one: each mapped stretch). `held`:
        the blocks now allocated, which the caller has."""
        known = [*held, *self._small.blocks.values(), *self._large.blocks.values()]
        known += [*self._small.unmapped, *self._large.unmapped]
        heads = sorted((b for b in known if b.prev is None), key=lambda block: block.address)
        return [run for head in heads for run in _mapped_runs(head)]

    def _cached(self, pool: _Pool, size: int) -> Block | None:
        """Best fit: the smallest free block that is large enough, lowest address first."""
        keys = pool.keys
        index = bisect_left(keys, size << _ADDRESS_BITS)
        if index == len(keys):
            return None
        if self.expandable:
            index = _least_growth(pool, index)
        return pool.blocks.pop(keys.pop(index))

    def _new(self, pool: _Pool, size: int) -> Block | None:
        """A fresh segment, or more of the expandable one; None when the cap forbids it."""
        if pool is self._small:
            wanted = SMALL_BUFFER_BYTES
        elif size < MIN_LARGE_BYTES:
            wanted = LARGE_BUFFER_BYTES
        else:
            wanted = -(-size // ROUND_LARGE_BYTES) * ROUND_LARGE_BYTES
        if self.cap_bytes is not None and self.reserved_bytes + wanted > self.cap_bytes:
            return None
        if self.expandable:
            return self._grow(pool, size)
        block = Block(self._space.take(wanted), wanted, pool)
        self._reserve(wanted)
        return block

    def _reserve(self, size: int) -> None:
        self.reserved_bytes += size
        if self.reserved_bytes > self.peak_reserved_bytes:
            self.peak_reserved_bytes = self.reserved_bytes

    def _split(self, block: Block, size: int) -> None:
        """Keep the low addresses, give the rest back to the pool."""
        rest = Block(block.address + size, block.size - size, block.pool)
        block.size = size
        _link_after(block, rest)
        block.pool.insert(rest)

    def _merge_neighbours(self, block: Block, pool: _Pool) -> None:
        before = block.prev
        if before is not None and not before.allocated and before.mapped == block.mapped:
            _take(pool, before)
            block.address, block.size = before.address, block.size + before.size
            block.prev = before.prev
            if before.prev is not None:
                before.prev.next = block
        after = block.next
        if after is not None and not after.allocated and after.mapped == block.mapped:
            _take(pool, after)
            block.size += after.size
            block.next = after.next
            if after.next is not None:
                after.next.prev = block

    def _grow(self, pool: _Pool, size: int) -> Block:
        """`try_allocate_expandable_block`: map what is missing after the free end of a segment."""
        block = _room(pool, size)
        if block is None:
            page = pool.segment_bytes  # pages are counted from the segment's own start
            block = Block(-(-self._next_address // page) * page, _EXPANDABLE_SPACE, pool)
            self._next_address = block.address + _EXPANDABLE_SPACE
            block.mapped = False
            pool.unmapped.append(block)
        if not block.mapped:
            block = self._map(block, min(block.size, size))
        while block.size < size:
            assert block.next is not None  # `_room` found the space
            block = self._map(block.next, min(size - block.size, block.next.size))
        pool.remove(block)
        return block

    def _map(self, block: Block, size: int) -> Block:
        """Back the first `size` bytes of an unmapped block, in whole pages of its pool."""
        pool = block.pool
        pool.unmapped.remove(block)
        mapped = min(-(-size // pool.segment_bytes) * pool.segment_bytes, block.size)
        block.mapped = True
        if mapped < block.size:
            rest = Block(block.address + mapped, block.size - mapped, pool)
            rest.mapped = False
            block.size = mapped
            _link_after(block, rest)
            pool.unmapped.append(rest)
        self._merge_neighbours(block, pool)
        pool.insert(block)
        self._reserve(mapped)
        if self.cap_bytes is not None and self.reserved_bytes > self.cap_bytes:
            raise OutOfMemoryError(f"pages of {mapped} bytes do not fit under {self.cap_bytes}")
        return block

    def _unmap(self, block: Block, pool: _Pool) -> None:
        """Give back the whole pages inside a free block."""
        page = pool.segment_bytes
        start = -(-block.address // page) * page
        end = (block.address + block.size) // page * page
        if start >= end or not block.mapped:
            return
        pool.remove(block)
        tail = block.address + block.size - end
        head = start - block.address
        hole = block
        if head:
            hole = Block(start, block.size - head, pool)
            block.size = head
            _link_after(block, hole)
            pool.insert(block)
        if tail:
            rest = Block(end, tail, pool)
            hole.size -= tail
            _link_after(hole, rest)
            pool.insert(rest)
        hole.mapped = False
        self._merge_neighbours(hole, pool)
        pool.unmapped.append(hole)
        self.reserved_bytes -= end - start


def _mapped_runs(head: Block) -> list[list[Block]]:
    runs: list[list[Block]] = [[]]
    block: Block | None = head
    while block is not None:
        if block.mapped:
            runs[-1].append(block)
        elif runs[-1]:
            runs.append([])
        block = block.next
    return [run for run in runs if run]


def _take(pool: _Pool, block: Block) -> None:
    if block.mapped:
        pool.remove(block)
    else:
        pool.unmapped.remove(block)


def _link_after(block: Block, rest: Block) -> None:
    rest.prev, rest.next = block, block.next
    if rest.next is not None:
        rest.next.prev = rest
    block.next = rest


def _least_growth(pool: _Pool, index: int) -> int:
    """With expandable segments a free block counts as large as it could grow to."""

    def growable(position: int) -> int:
        block = pool.blocks[pool.keys[position]]
        after = block.next
        return block.size + (after.size if after is not None and not after.mapped else 0)

    while index + 1 < len(pool.keys) and growable(index + 1) < growable(index):
        index += 1
    return index


def _room(pool: _Pool, size: int) -> Block | None:
    """The lowest free stretch that ends in unmapped space and holds `size` bytes."""
    for candidate in sorted(pool.unmapped, key=lambda block: block.address):
        start = candidate
        if candidate.prev is not None and not candidate.prev.allocated:
            start = candidate.prev
        available, block = 0, start
        while block is not None and not block.allocated and available < size:
            available += block.size
            block = block.next  # type: ignore[assignment]
        if available >= size:
            return start
    return None
