"""The compiled replay against the block by block allocator, on random streams of requests to both
pools, with and without a cap."""

from __future__ import annotations

from array import array

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.memory.allocator import ROUND_LARGE_BYTES, SMALL_BYTES
from planner.memory.pools import (
    CAPPED,
    RELEASE,
    RESET,
    Counters,
    Part,
    replay_in_python,
    replay_parts,
    settle,
    settle_in_python,
    shifted,
)
from planner.memory.replay import EMPTY_CACHE, replay

MIB = 1 << 20
BLOCK = 512
# Few distinct sizes, as a training step has, and some that nothing fits exactly.
SIZES = st.one_of(
    st.sampled_from([MIB + BLOCK, 2 * MIB, 5 * MIB, 10 * MIB, 11 * MIB, 21 * MIB, 64 * MIB]),
    st.sampled_from([BLOCK, 2 * BLOCK, 16_384, 262_144, SMALL_BYTES - BLOCK, SMALL_BYTES]),
    st.integers(1, SMALL_BYTES // BLOCK).map(lambda blocks: blocks * BLOCK),
    st.integers(SMALL_BYTES // BLOCK + 1, 80 * MIB // BLOCK).map(lambda blocks: blocks * BLOCK),
)


@st.composite
def streams(draw: st.DrawFn) -> tuple[list[int], list[int]]:
    """(sizes, events): i allocates sizes[i], ~i frees it."""
    sizes = draw(st.lists(SIZES, min_size=1, max_size=60))
    events: list[int] = []
    live: list[int] = []
    for index in range(len(sizes)):
        events.append(index)
        live.append(index)
        for _ in range(draw(st.integers(0, 2))):
            if live:
                events.append(~live.pop(draw(st.integers(0, len(live) - 1))))
    return sizes, events


def _expected(sizes: list[int], events: list[int], cap_bytes: int | None) -> Counters:
    stream = [(i, sizes[i]) if i >= 0 else (~i, 0) for i in events]
    again = [(key + len(sizes), size) for key, size in stream]
    told = replay([*stream, EMPTY_CACHE, *again], cap_bytes=cap_bytes)
    return Counters(
        told.ok, told.allocated_bytes, told.peak_allocated_bytes, told.reserved_bytes,
        told.peak_reserved_bytes,
    )  # fmt: skip


def _parts(sizes: list[int], events: list[int], capped: int) -> list[Part]:
    """The stream twice, the cache emptied between."""
    first = _part(sizes, events, 0, capped | RELEASE)
    return [first, _part(sizes, events, len(sizes), capped)]


def _part(sizes: list[int], events: list[int], base: int, flags: int) -> Part:
    return Part(events=array("q", events), sizes=array("q", sizes), base=base, flags=flags)


@settings(max_examples=150, deadline=None)
@given(streams())
def test_without_a_cap_every_counter_is_the_allocators(stream: tuple[list[int], list[int]]) -> None:
    expected = _expected(*stream, None)
    for run in (replay_parts, replay_in_python):
        assert run(_parts(*stream, 0)) == expected


@settings(max_examples=150, deadline=None)
@given(streams(), st.integers(0, 100))
def test_under_a_cap_both_pass_or_both_fail(
    stream: tuple[list[int], list[int]], percent: int
) -> None:
    free = _expected(*stream, None)
    span = free.peak_reserved - free.peak_allocated
    cap = free.peak_allocated + span * percent // 100 // ROUND_LARGE_BYTES * ROUND_LARGE_BYTES
    expected = _expected(*stream, cap)
    for run in (replay_parts, replay_in_python):
        found = run(_parts(*stream, CAPPED), cap)
        assert found.ok == expected.ok
        if found.ok:
            assert found == expected


@settings(max_examples=400, deadline=None)
@given(streams(), streams(), st.integers(1, 400))
def test_steps_settle_where_a_plain_bisection_finds(
    load: tuple[list[int], list[int]], step: tuple[list[int], list[int]], resolution: int
) -> None:
    before = _part(*load, 0, RELEASE)
    first = _part(*step, len(load[0]), CAPPED | RESET)
    later = _part(*step, len(load[0]) + len(step[0]), CAPPED)
    again = later._replace(base=later.base + len(step[0]))
    expected = settle_in_python([before], [first, later], again, 1, resolution)
    assert settle([before], [first, later], again, 1, resolution) == expected
    assert replay_in_python([before, first, later, again], expected.cap).ok


@settings(max_examples=400, deadline=None)
@given(streams(), streams(), st.integers(1, 400), st.integers(0, 3))
def test_a_last_part_that_comes_again_settles_where_a_plain_bisection_finds(
    load: tuple[list[int], list[int]], step: tuple[list[int], list[int]], resolution: int,
    times: int,
) -> None:  # fmt: skip
    sizes, events = step
    whole = (sizes, events + [~index for index in range(len(sizes)) if ~index not in events])
    before = _part(*load, 0, RELEASE)
    first = _part(*whole, len(load[0]), CAPPED | RESET)
    later = _part(*whole, len(load[0]) + len(sizes), CAPPED)
    steps = [first, later, later][: 2 + times % 2]
    expected = settle_in_python([before], steps, later, times, resolution)
    assert settle([before], steps, later, times, resolution) == expected


SHIFTS = st.lists(st.integers(0, 9), min_size=10, max_size=10)


@given(st.lists(st.integers(0, 99), max_size=50), SHIFTS, SHIFTS, st.integers(0, 3))
def test_indices_move_by_the_shift_of_their_stretch(
    indices: list[int], shifts: list[int], steps: list[int], times: int
) -> None:
    starts = array("q", range(0, 100, 10))
    events = array("q", [index if index % 2 else ~index for index in indices])
    expected = []
    for turn in range(times):
        moved = [index + shifts[index // 10] + turn * steps[index // 10] for index in indices]
        expected += [new if old % 2 else ~new for old, new in zip(indices, moved, strict=True)]
    found = shifted(events, starts, array("q", shifts), array("q", steps), times)
    assert list(found) == expected


@pytest.mark.parametrize("events", [[0, -1, -1], [-1], [0, -1, 1, -1]])
def test_a_release_of_what_is_not_held_is_no_answer(events: list[int]) -> None:
    for run in (replay_parts, replay_in_python):
        with pytest.raises((ValueError, KeyError)):
            run([_part([2 * MIB, 2 * MIB], events, 0, 0)])
