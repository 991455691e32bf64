"""The Pareto front of a sweep: rows that no other row beats in both memory and speed."""

from __future__ import annotations

from collections.abc import Hashable, Iterable


def pareto(points: Iterable[tuple[Hashable, float, float] | None]) -> list[bool]:
    """Whether each point is on its group's front. A point is (group, bytes, tokens per second);
    None (a row that cannot be, or does not fit) never is.

    A point is beaten when another of its group needs no more bytes and is no slower, and is better
    in one of them. O(n log n).
    """
    marks: list[bool] = []
    groups: dict[Hashable, list[tuple[float, float, int]]] = {}
    for index, point in enumerate(points):
        marks.append(False)
        if point is not None:
            group, size, speed = point
            groups.setdefault(group, []).append((size, -speed, index))
    for members in groups.values():
        members.sort()
        best, last = float("inf"), (float("nan"), float("nan"))
        for size, slowness, index in members:
            if slowness < best or (size, slowness) == last:
                marks[index], best, last = True, slowness, (size, slowness)
    return marks
