"""The bisection against runs whose real requirement is known."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from planner.units import GIB, MIB
from probes.capacity import BRACKET_BYTES, BRACKET_RELATIVE, around, smallest_cap
from probes.records import Attempt

sizes = st.integers(min_value=MIB, max_value=100 * GIB)


def runs_from(required: int):
    return lambda cap: Attempt(cap_bytes=cap, passed=cap >= required)


@given(allocated=sizes, gap=st.floats(0, 1), part=st.floats(0, 1))
def test_smallest_cap_brackets_the_requirement(allocated: int, gap: float, part: float) -> None:
    reserved = allocated + int(allocated * gap)
    required = allocated + int((reserved - allocated) * part)
    found = smallest_cap(runs_from(required), allocated, reserved)
    assert found is not None
    assert found.passed_cap_bytes >= required
    assert found.failed_cap_bytes is None or found.failed_cap_bytes < required
    lower = found.failed_cap_bytes or allocated
    width = found.passed_cap_bytes - lower
    assert width <= max(BRACKET_BYTES, int(found.passed_cap_bytes * BRACKET_RELATIVE))


@given(
    required=st.integers(GIB, 100 * GIB), off=st.floats(0.9, 1.1), low=st.floats(0.5, 1),
    proven=st.booleans(),
)  # fmt: skip
def test_a_search_around_a_guess_brackets_the_requirement(
    required: int, off: float, low: float, proven: bool
) -> None:
    high = int(required * 1.05) if proven else None
    found = around(runs_from(required), int(required * off), int(required * low) - 1, high)
    assert found is not None
    assert found.failed_cap_bytes is None or found.failed_cap_bytes < required
    assert required <= found.passed_cap_bytes
    lower = found.failed_cap_bytes or int(required * low) - 1
    width = found.passed_cap_bytes - lower
    assert width <= max(BRACKET_BYTES, int(found.passed_cap_bytes * BRACKET_RELATIVE))


def test_a_right_guess_takes_two_tries() -> None:
    found = around(runs_from(10 * GIB), 10 * GIB + MIB, 8 * GIB)
    assert found is not None
    assert [tried.passed for tried in found.attempts] == [True, False]


def test_smallest_cap_above_reserved_is_found() -> None:
    """A used process may have needed more than its reserved peak says."""
    found = smallest_cap(runs_from(11 * GIB), 8 * GIB, 10 * GIB)
    assert found is not None
    assert found.failed_cap_bytes is not None
    assert found.failed_cap_bytes < 11 * GIB <= found.passed_cap_bytes


def test_smallest_cap_that_nothing_passes_is_none() -> None:
    assert smallest_cap(runs_from(100 * GIB), 8 * GIB, 10 * GIB) is None


def test_confirmation_that_fails_moves_the_bracket_up() -> None:
    """More steps than the tries ran may need more."""
    found = smallest_cap(
        runs_from(9 * GIB), 8 * GIB, 12 * GIB, confirm=runs_from(9 * GIB + 300 * MIB)
    )
    assert found is not None
    assert found.failed_cap_bytes is not None
    assert found.failed_cap_bytes < 9 * GIB + 300 * MIB <= found.passed_cap_bytes
    assert found.attempts[-1].passed
