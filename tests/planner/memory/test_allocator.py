"""The caching allocator against sequences worked out from c10/cuda/CUDACachingAllocator.cpp, what a
card reported, and properties that hold for any sequence."""

from __future__ import annotations

import time
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.memory.allocator import CachingAllocator, OutOfMemoryError
from planner.memory.replay import EMPTY_CACHE, RESET_PEAKS, replay, smallest_cap

MIB = 1 << 20


@pytest.mark.parametrize(
    ("request_bytes", "allocated", "reserved"),
    [
        (1, 512, 2 * MIB),  # round_size, kSmallBuffer
        (513, 1024, 2 * MIB),
        (MIB, MIB, 2 * MIB),  # kSmallSize itself is small
        (MIB + 1, MIB + 512, 20 * MIB),  # kLargeBuffer
        (10 * MIB - 512, 10 * MIB - 512, 20 * MIB),
        (10 * MIB, 10 * MIB, 10 * MIB),  # kMinLargeAlloc: kRoundLarge from here on
        (22_544_384, 22 * MIB, 22 * MIB),  # a remainder of 512 KiB is not split off
        (25 * MIB, 26 * MIB, 26 * MIB),  # nor is one of exactly kSmallSize
        (25 * MIB - 512, 25 * MIB - 512, 26 * MIB),  # one of 512 bytes more is
    ],
)
def test_first_allocation(request_bytes: int, allocated: int, reserved: int) -> None:
    allocator = CachingAllocator()
    allocator.malloc(request_bytes)
    assert (allocator.allocated_bytes, allocator.reserved_bytes) == (allocated, reserved)


def test_best_fit_takes_the_smallest_block_and_the_lowest_address() -> None:
    allocator = CachingAllocator()
    blocks = [allocator.malloc(size * MIB) for size in (30, 12, 20, 12)]
    for block in blocks:
        allocator.free(block)
    # of two that fit, the later segment: the driver puts new ranges below the old ones
    assert blocks[3].address < blocks[1].address
    assert allocator.malloc(12 * MIB).address == blocks[3].address
    assert allocator.malloc(12 * MIB).address == blocks[1].address
    assert allocator.malloc(13 * MIB).address == blocks[2].address


def test_neighbours_merge_when_freed() -> None:
    allocator = CachingAllocator()
    first = [allocator.malloc(4 * MIB) for _ in range(5)]  # one segment of 20 MiB
    assert allocator.reserved_bytes == 20 * MIB
    for block in (first[1], first[3], first[2]):
        allocator.free(block)
    middle = allocator.malloc(12 * MIB)
    assert allocator.reserved_bytes == 20 * MIB
    assert middle.address == first[0].address + 4 * MIB


def test_cache_is_given_back_under_a_cap_and_asked_again() -> None:
    stream = [(1, 30 * MIB), (1, 0), (2, 40 * MIB)]
    assert replay(stream).peak_reserved_bytes == 70 * MIB
    capped = replay(stream, cap_bytes=40 * MIB)
    assert (capped.ok, capped.retries, capped.reserved_bytes) == (True, 1, 40 * MIB)
    assert not replay(stream, cap_bytes=40 * MIB - 1).ok


def test_a_split_segment_cannot_be_given_back() -> None:
    stream = [(1, 4 * MIB), (2, 4 * MIB), (1, 0), EMPTY_CACHE]
    assert replay(stream).reserved_bytes == 20 * MIB
    assert replay([*stream, (2, 0), EMPTY_CACHE]).reserved_bytes == 0


def test_expandable_segments_map_pages_of_20_mib_and_split_finely() -> None:
    result = replay([(1, 22_544_384), (2, 3 * MIB)], expandable_segments=True)
    assert result.allocated_bytes == 22_544_384 + 3 * MIB
    assert result.reserved_bytes == 40 * MIB
    freed = replay([(1, 50 * MIB), (1, 0), EMPTY_CACHE], expandable_segments=True)
    assert freed.reserved_bytes == 0


def test_peaks_are_reset_where_the_stream_says() -> None:
    result = replay([(1, 100 * MIB), (1, 0), RESET_PEAKS, (2, 12 * MIB)])
    assert (result.peak_allocated_bytes, result.peak_reserved_bytes) == (12 * MIB, 100 * MIB)


sizes = st.one_of(
    st.integers(1, 2 * MIB), st.integers(MIB, 12 * MIB), st.integers(10 * MIB, 80 * MIB)
)


@st.composite
def streams(draw: st.DrawFn) -> list[tuple[int, int]]:
    live: list[int] = []
    events: list[tuple[int, int]] = []
    for key in range(draw(st.integers(1, 60))):
        events.append((key, draw(sizes)))
        live.append(key)
        while live and draw(st.booleans()):
            events.append((live.pop(draw(st.integers(0, len(live) - 1))), 0))
    return events


@settings(max_examples=80, deadline=None)
@given(streams(), st.booleans())
def test_any_stream_keeps_the_books(stream: list[tuple[int, int]], expandable: bool) -> None:
    allocator = CachingAllocator(expandable_segments=expandable)
    held: dict[int, tuple[object, int]] = {}
    for key, size in stream:
        if size:
            held[key] = (allocator.malloc(size), size)
        else:
            allocator.free(held.pop(key)[0])  # type: ignore[arg-type]
        spans = sorted((b.address, b.address + b.size) for b, _ in held.values())  # type: ignore[attr-defined]
        assert all(a[1] <= b[0] for a, b in pairwise(spans))  # no overlap
        assert all(b.size >= size for b, size in held.values())  # type: ignore[attr-defined]
        assert allocator.allocated_bytes == sum(b.size for b, _ in held.values())  # type: ignore[attr-defined]
        assert allocator.allocated_bytes <= allocator.reserved_bytes
    segments = allocator.segments([block for block, _ in held.values()])  # type: ignore[misc]
    assert sum(b.size for segment in segments for b in segment) == allocator.reserved_bytes
    for block, _ in held.values():
        allocator.free(block)  # type: ignore[arg-type]
    allocator.empty_cache()
    assert (allocator.allocated_bytes, allocator.reserved_bytes) == (0, 0)


@settings(max_examples=30, deadline=None)
@given(streams(), st.booleans())
def test_the_smallest_cap_completes_and_lies_between_the_peaks(
    stream: list[tuple[int, int]], expandable: bool
) -> None:
    free = replay(stream, expandable_segments=expandable)
    cap = smallest_cap(stream, expandable_segments=expandable)
    assert free.peak_allocated_bytes <= cap
    assert expandable or cap <= free.peak_reserved_bytes
    assert replay(stream, cap_bytes=cap, expandable_segments=expandable).ok


def test_without_room_it_says_so() -> None:
    with pytest.raises(OutOfMemoryError, match="do not fit"):
        CachingAllocator(10 * MIB).malloc(20 * MIB)


def test_forty_thousand_events_are_quick() -> None:
    stream: list[tuple[int, int]] = []
    for key in range(20_000):
        stream.append((key, (key * 7919 % 97 + 1) * 50_000))
        if key >= 200:
            stream.append((key - 200, 0))
    best = min(_seconds(stream) for _ in range(3))
    assert best < 0.6  # 0.1 s on a free core
    assert replay(stream).peak_reserved_bytes >= replay(stream).peak_allocated_bytes


def _seconds(stream: list[tuple[int, int]]) -> float:
    started = time.process_time()
    replay(stream)
    return time.process_time() - started
