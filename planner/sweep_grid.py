"""A grid: a run spec whose fields under [grid] are lists, every combination of which is wanted.

model = "facebook/chameleon-7b"
device = "rtx-3090"
[grid]
micro_batch_size = [1, 2, 4]
lora.rank = [8, 16]
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from planner.devices import find_device
from planner.errors import InputError, Problem, VramwiseError
from planner.models.registry import load_model
from planner.spec import RunSpec, spec_from_mapping

MOST_COMBINATIONS = 20_000_000


@dataclass(frozen=True, slots=True)
class Axis:
    """One field by dotted name, and its values, validated."""

    name: str
    values: tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class Grid:
    """`base` holds the first value of every axis."""

    base: RunSpec
    axes: tuple[Axis, ...]

    @property
    def size(self) -> int:
        """Combinations."""
        return prod(len(axis.values) for axis in self.axes)


def grid_from_mapping(mapping: Mapping[str, Any]) -> Grid:
    """A grid of a parsed file; raises InputError naming every bad field and value at once.

    Each value is validated once, beside the first values of the other axes: no field of a run
    spec depends on another for being valid.
    """
    values = {name: value for name, value in mapping.items() if name != "grid"}
    listed = mapping.get("grid", {})
    if not isinstance(listed, Mapping):
        raise InputError(Problem("grid", "is not a table of lists", listed))
    problems: list[Problem] = []
    lists = dict(_flatten(listed, ""))
    for name, entries in lists.items():
        if not isinstance(entries, list) or not entries:
            problems.append(Problem(f"grid.{name}", "is not a list of values", entries))
    if problems:
        raise InputError(problems)
    first = _with(values, {name: entries[0] for name, entries in lists.items()})
    axes = []
    for name, entries in lists.items():
        found = []
        for entry in entries:
            try:
                found.append(_field(spec_from_mapping(_with(first, {name: entry})), name))
                _check_name(name, entry)
            except InputError as error:
                problems += [_renamed(p, lists) for p in error.problems]
            except VramwiseError as error:
                problems.append(Problem(f"grid.{name}", str(error), entry))
        axes.append(Axis(name, tuple(dict.fromkeys(found))))
    if problems:
        raise InputError(list({str(problem): problem for problem in problems}.values()))
    grid = Grid(spec_from_mapping(first), tuple(axes))
    _check_name("model", grid.base.model)
    if grid.base.device is not None:
        _check_name("device", grid.base.device)
    if grid.size > MOST_COMBINATIONS:
        raise InputError(Problem("grid", "has too many combinations", grid.size,
                                 f"at most {MOST_COMBINATIONS:,}"))  # fmt: skip
    return grid


def _check_name(name: str, value: Any) -> None:
    """Models and cards must be known before a long sweep starts."""
    if name == "model":
        load_model(value)
    elif name == "device" and value is not None:
        find_device(value)


def _flatten(table: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in table.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _with(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A nested copy of `values` with dotted names set."""
    copy = {name: dict(v) if isinstance(v, Mapping) else v for name, v in values.items()}
    for dotted, value in changes.items():
        outer, _, inner = dotted.partition(".")
        if inner:
            table = copy.setdefault(outer, {})
            if isinstance(table, dict):
                table[inner] = value
        else:
            copy[outer] = value
    return copy


def _field(spec: RunSpec, dotted: str) -> Any:
    value: Any = spec
    for part in dotted.split("."):
        value = getattr(value, part)
    return value


def _renamed(problem: Problem, lists: Mapping[str, Any]) -> Problem:
    inside = any(problem.field == name or problem.field.startswith(f"{name}.") for name in lists)
    name = f"grid.{problem.field}" if inside else problem.field
    return Problem(name, problem.message, problem.received, problem.allowed, problem.nearest)
