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


class Block:
    """What an allocation was: kept after the storage is gone, so that the peak can be explained."""

    __slots__ = ("category", "dtype", "module", "nbytes", "op", "shape")

    def __init__(
        self,
        nbytes: Any,
        shape: tuple[Any, ...],
        dtype: DType,
        module: str,
        op: str,
        category: str,
    ) -> None:
        self.nbytes = nbytes
        self.shape = shape
        self.dtype = dtype
        self.module = module
        self.op = op
        self.category = category


class Storage:
    """A live block; releasing the last reference to it frees the bytes."""

    __slots__ = ("block", "index", "recorder")

    def __init__(self, recorder: Recorder, index: int, block: Block) -> None:
        self.recorder = recorder
        self.index = index
        self.block = block

    def __del__(self) -> None:
        recorder = self.recorder
        recorder.live_bytes = recorder.live_bytes - self.block.nbytes
        recorder.events.append(~self.index)


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

    `events` holds i for the allocation of `blocks[i]` and ~i for its release.
    """

    def __init__(self) -> None:
        self.live_bytes: Any = 0
        self.blocks: list[Block] = []
        self.sizes: MutableSequence[Any] = []  # of the blocks, for the allocator
        self.events: MutableSequence[int] = []
        self.module = ""
        self.instants: list[Instant] = []
        self._instant = "loaded"
        self._peak: Any = 0
        self._peak_event = 0
        self._start = 0

    def allocate(
        self, shape: tuple[Any, ...], dtype: DType, op: str, category: str = "temporaries"
    ) -> Storage:
        """A new block of prod(shape) elements of `dtype`."""
        nbytes = (prod(shape) * dtype.itemsize + 511) // 512 * 512
        block = Block(nbytes, shape, dtype, self.module, op, category)
        blocks = self.blocks
        index = len(blocks)
        blocks.append(block)
        self.sizes.append(nbytes)
        self.events.append(index)
        self.live_bytes = self.live_bytes + nbytes
        self.note_peak()
        return Storage(self, index, block)

    def note_peak(self) -> None:
        """Raise the current instant's peak to the live bytes."""
        if self.live_bytes > self._peak:
            self._peak = self.live_bytes
            self._peak_event = len(self.events)

    def enter(self, instant: str) -> None:
        """Close the current instant and open another."""
        self.instants.append(Instant(self._instant, self._peak, self._peak_event, self._start))
        self._instant = instant
        self._start = len(self.events)
        self._peak = self.live_bytes
        self._peak_event = len(self.events)

    def resume(self, instants: list[Instant], live_bytes: int) -> None:
        """Go on from a recorded stream (blocks, sizes and events set); the last instant is open."""
        *self.instants, last = instants
        self._instant, self._peak = last.name, last.peak_bytes
        self._peak_event, self._start = last.event, last.start
        self.live_bytes = live_bytes

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
