"""Storages and the recorder: every allocation and release of a step, in order, in bytes.

A storage is what torch calls an untyped storage: one block of the caching allocator, rounded up to
512 bytes (kMinBlockSize in c10/cuda/CUDACachingAllocator.cpp). It is released when the last tensor
that refers to it goes: Python's reference counts do here what C++'s do in torch.

Sizes are ints, or numpy int64 arrays when one program is evaluated for many (batch, sequence)
pairs at once; nothing in this package branches on a size except where torch itself does.
"""

from __future__ import annotations

from collections.abc import MutableSequence
from itertools import compress
from math import prod
from typing import Any, NamedTuple

from planner.dtypes import DType

BLOCK_BYTES = 512  # kMinBlockSize
bare = object.__new__  # of what is made thousands of times: to fill, for less than __init__ takes


class Block:
    """What an allocation was: kept after the storage is gone, so that the peak can be explained.
    Made by `Recorder.allocate`."""

    __slots__ = ("category", "dtype", "module", "nbytes", "op", "shape")

    nbytes: Any
    shape: tuple[Any, ...]
    dtype: DType
    module: str
    op: str
    category: str


class Storage:
    """A live block; releasing the last reference to it frees the bytes. Made by
    `Recorder.allocate`."""

    __slots__ = ("block", "events", "index")

    block: Block
    events: MutableSequence[int]
    index: int

    def __del__(self) -> None:
        self.events.append(~self.index)


class _Scope:
    """`with recorder.scope(module)`: entered at every layer, so no generator."""

    __slots__ = ("module", "outer", "recorder")

    def __init__(self, recorder: Recorder, module: str) -> None:
        self.recorder = recorder
        self.module = module

    def __enter__(self) -> None:
        self.outer = self.recorder.module
        self.recorder.module = self.module

    def __exit__(self, *_: object) -> None:
        self.recorder.module = self.outer


class Instant(NamedTuple):
    """A named stretch of the step: the most bytes live at once in it, the event where, and the
    event at which it starts."""

    name: str
    peak_bytes: Any
    event: int
    start: int


class Recorder:
    """Live bytes over a step: events in order, and the peak of each named instant.

    `events` holds i for the allocation of `blocks[i]` and ~i for its release. They are summed when
    an instant ends, not one by one.
    """

    def __init__(self) -> None:
        self.blocks: list[Block] = []
        self.sizes: MutableSequence[Any] = []  # of the blocks, for the allocator
        self.events: MutableSequence[int] = []
        self.module = ""
        self.instants: list[Instant] = []
        self._instant = "loaded"
        self._peak: Any = 0
        self._peak_event = 0
        self._start = 0
        self._live: Any = 0  # after the first so many events
        self._summed = 0

    def allocate(
        self, shape: tuple[Any, ...], dtype: DType, op: str, category: str = "temporaries"
    ) -> Storage:
        """A new block of prod(shape) elements of `dtype`."""
        block = bare(Block)
        block.nbytes = nbytes = (prod(shape) * dtype.itemsize + 511) // 512 * 512
        block.shape = shape
        block.dtype = dtype
        block.module = self.module
        block.op = op
        block.category = category
        blocks, events = self.blocks, self.events
        storage = bare(Storage)
        storage.block = block
        storage.events = events
        storage.index = index = len(blocks)
        blocks.append(block)
        self.sizes.append(nbytes)
        events.append(index)
        return storage

    @property
    def live_bytes(self) -> Any:
        """Bytes live now."""
        self.sum_up()
        return self._live

    def sum_up(self) -> None:
        """Follow the live bytes over the events since the last time."""
        live, sizes = self._live, self.sizes
        for position in range(self._summed, len(self.events)):
            index = self.events[position]
            if index < 0:
                live = live - sizes[~index]
                continue
            live = live + sizes[index]
            if live > self._peak:
                self._peak, self._peak_event = live, position + 1
        self._live, self._summed = live, len(self.events)

    def enter(self, instant: str) -> None:
        """Close the current instant and open another."""
        self.sum_up()
        self.instants.append(Instant(self._instant, self._peak, self._peak_event, self._start))
        self._instant = instant
        self._start = self._peak_event = len(self.events)
        self._peak = self._live

    def copy(self) -> Recorder:
        """One to go on with from here, while this one stays as it is."""
        self.sum_up()
        twin = Recorder()
        twin.blocks, twin.sizes, twin.events = self.blocks[:], self.sizes[:], self.events[:]
        last = Instant(self._instant, self._peak, self._peak_event, self._start)
        twin.resume([*self.instants, last], self._live)
        return twin

    def resume(self, instants: list[Instant], live_bytes: int) -> None:
        """Go on from a recorded stream (blocks, sizes and events set); the last instant is open."""
        *self.instants, last = instants
        self._instant, self._peak = last.name, last.peak_bytes
        self._peak_event, self._start = last.event, last.start
        self._live, self._summed = live_bytes, len(self.events)

    def mark(self, label: tuple[str, int]) -> None:
        """Called where a decoder layer's forward or backward starts; some recorders keep it."""

    def scope(self, module: str) -> _Scope:
        """Attribute what is allocated inside to `module`."""
        return _Scope(self, module)

    def live_at(self, event: int) -> list[Block]:
        """The blocks live after the first `event` events, in order of allocation."""
        live = bytearray(len(self.blocks))
        for index in self.events[:event]:
            if index >= 0:
                live[index] = 1
            else:
                live[~index] = 0
        return list(compress(self.blocks, live))
