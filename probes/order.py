"""Which probe next: those that share a load together, and first those that teach the most."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from planner.spec import RunSpec
from probes.grid import Point

# What counts as new in a point: fields and pairs of fields, the pairs at this part of a field.
_PAIR_WEIGHT = 0.1
# A load costs about as much time as this many shapes.
_LOAD_COST = 4.0


@dataclass(frozen=True, slots=True)
class Group:
    """Points of one load, in the order in which they run."""

    load: tuple[Any, ...]
    points: tuple[Point, ...]


def load_key(spec: RunSpec, weights: str = "random", repeat: int = 0) -> tuple[Any, ...]:
    """Probes with equal keys can share a load. The adapters of one load may differ; what loading
    itself decides, what the k-bit preparation casts and how the allocator is set may not."""
    lean_adapters = spec.stack == "lean" and spec.method == "lora"
    return (
        spec.model, spec.stack, spec.method, spec.quantization,
        spec.double_quant if spec.quantization in ("nf4", "fp4") else None,
        spec.precision if lean_adapters else spec.weights_dtype,
        spec.attention, spec.expandable_segments, weights, repeat,
    )  # fmt: skip


def in_order(points: Sequence[Point]) -> list[Group]:
    """Group by load, both in the given order."""
    groups: dict[tuple[Any, ...], list[Point]] = {}
    for point in points:
        groups.setdefault(_load_key(point), []).append(point)
    return [Group(load, tuple(members)) for load, members in groups.items()]


def arrange(points: Sequence[Point], known: Iterable[Point] = ()) -> list[Group]:
    """Group by load within a priority; order the groups, and the points in them, greedily by what
    they show that no earlier probe, nor any `known` one, has shown."""
    seen: Counter[Any] = Counter()
    for point in known:
        seen.update(_features(point).keys())
    groups: list[Group] = []
    for _, same in itertools.groupby(sorted(points, key=lambda p: p.priority), _priority):
        remaining: dict[tuple[Any, ...], list[Point]] = {}
        for point in same:
            remaining.setdefault(_load_key(point), []).append(point)
        while remaining:
            load = max(remaining, key=lambda k: _worth(remaining[k], seen))
            chosen = tuple(_by_novelty(remaining.pop(load), seen))
            groups.append(Group(load, chosen))
    return groups


def split(groups: Iterable[Group], size: int, *, fresh_capacity: bool = False) -> list[Group]:
    """No group longer than `size`: several cards share the work, and no child grows old.

    fresh_capacity: a bisected point comes first in its process, because the smallest cap depends on
    where earlier shapes left segments; what is allocated does not, and follows in the same load.
    """
    found = []
    for group in groups:
        part: list[Point] = []
        for point in group.points:
            if part and (len(part) == size or (fresh_capacity and point.options.bisect)):
                found.append(Group(group.load, tuple(part)))
                part = []
            part.append(point)
        found.append(Group(group.load, tuple(part)))
    return found


def _priority(point: Point) -> int:
    return point.priority


def _load_key(point: Point) -> tuple[Any, ...]:
    return load_key(point.spec, point.options.weights, point.options.repeat)


def _by_novelty(points: list[Point], seen: Counter[Any]) -> Iterator[Point]:
    """Most novel first; paged optimizers last, whose managed memory stays with the process."""
    left = list(points)
    while left:
        best = max(left, key=lambda p: (not _paged(p), _novelty(p, seen)))
        left.remove(best)
        seen.update(_features(best).keys())
        yield best


def _paged(point: Point) -> bool:
    return point.spec.optimizer.startswith("paged")


def _worth(points: list[Point], seen: Counter[Any]) -> float:
    return sum(_novelty(p, seen) for p in points) / (len(points) + _LOAD_COST)


def _novelty(point: Point, seen: Counter[Any]) -> float:
    return sum(weight / (1 + seen[name]) for name, weight in _features(point).items())


def _features(point: Point) -> dict[Any, float]:
    apart = {"schedule", "versions", "device", "device_memory", "host_memory"}
    values = point.spec.model_dump(mode="json", exclude=apart)
    lora = values.pop("lora")
    flat = {**values, **{f"lora.{k}": str(v) for k, v in lora.items()}}
    if point.spec.method == "full":
        flat = {k: v for k, v in flat.items() if not k.startswith("lora.")}
    single = [(k, str(v)) for k, v in flat.items()]
    pairs = itertools.combinations(single, 2)
    return {**dict.fromkeys(single, 1.0), **dict.fromkeys(pairs, _PAIR_WEIGHT)}
