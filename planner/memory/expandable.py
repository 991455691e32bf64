"""Replays with expandable segments: the general model of planner.memory.allocator over parts.

`_expandable.c` does the same in C; where it could not be compiled, the model in Python answers.
"""

# Annotations stay objects here: named tuples would compile each string at import.
from collections.abc import Callable, Sequence
from typing import NamedTuple

from planner.memory.pools import CAPPED, RELEASE, RESET, Part
from planner.memory.storage import BLOCK_BYTES

try:
    from planner.memory import _expandable  # type: ignore[attr-defined]
except ImportError:  # no compiler at installation
    _expandable = None


class Expanded(NamedTuple):
    """What the allocator says after a replay; `ok` is False where the cap was too small."""

    ok: bool
    allocated: int
    peak_allocated: int
    reserved: int
    peak_reserved: int


def expandable_replay(parts: Sequence[Part]) -> Callable[[int], Expanded]:
    """A function that replays the parts under a cap in bytes (-1: none)."""
    if _expandable is None:
        return expandable_replay_in_python(parts)
    capped = [part._replace(flags=part.flags | CAPPED) for part in parts]
    return lambda cap: Expanded(*_expandable.replay(capped, cap))


def expandable_replay_in_python(parts: Sequence[Part]) -> Callable[[int], Expanded]:
    """`expandable_replay` without the compiled module."""
    from planner.memory.replay import EMPTY_CACHE, RESET_PEAKS, replay

    stream: list[tuple[int, int]] = []
    for part in parts:
        sizes, base = [size or BLOCK_BYTES for size in part.sizes], part.base
        if part.flags & RESET:
            stream.append(RESET_PEAKS)
        stream += [(base + i, sizes[i]) if i >= 0 else (base + ~i, 0) for i in part.events]
        if part.flags & RELEASE:
            stream.append(EMPTY_CACHE)

    def run(cap: int) -> Expanded:
        told = replay(stream, cap_bytes=None if cap < 0 else cap, expandable_segments=True)
        return Expanded(
            told.ok, told.allocated_bytes, told.peak_allocated_bytes, told.reserved_bytes,
            told.peak_reserved_bytes,
        )  # fmt: skip

    return run
