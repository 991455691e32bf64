"""The front, against its definition by brute force."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from planner.pareto import pareto

_POINT = st.tuples(st.sampled_from("ab"), st.integers(0, 6), st.integers(0, 6))


def _beats(one: tuple[str, int, int], other: tuple[str, int, int]) -> bool:
    return (
        one[0] == other[0] and one[1] <= other[1] and one[2] >= other[2] and one[1:] != other[1:]
    )  # fmt: skip


@given(st.lists(st.none() | _POINT, max_size=30))
def test_front_is_what_nothing_beats(points: list[tuple[str, int, int] | None]) -> None:
    expected = [
        point is not None
        and not any(other is not None and _beats(other, point) for other in points)
        for point in points
    ]
    assert pareto(points) == expected
