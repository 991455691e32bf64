"""A campaign file -> the probes it asks for.

Fields of the spec stand at the top; lists of values under `[grid]`, dotted names for nested fields;
several `[[grids]]`, each with its own fields, `grid`, `points` (a list of overrides, taken one by
one), `priority` (lower runs first) and options (`steps`, `warmup_steps`, `bisect`, `repeat`, ...).
`order = "file"` keeps the file's order where `"teach"` (the default) runs the most novel first.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from planner.errors import InputError, Problem, nearest_name
from planner.spec import RunSpec, read_mapping, spec_from_mapping
from probes.records import Options, probe_key

_OPTIONS = tuple(Options.model_fields)
_KEYS = ("grid", "grids", "points", "priority", "options", "campaign", "about")


@dataclass(frozen=True, slots=True)
class Point:
    """One probe to run: its identity, spec and options, and how early it should run."""

    key: str
    spec: RunSpec
    options: Options
    priority: int = 0
    campaign: str = "probe"


@dataclass(frozen=True, slots=True)
class Campaign:
    """A named list of points, in the file's order, each once. `in_order`: they run in it too."""

    name: str
    points: tuple[Point, ...]
    in_order: bool = False


def read_campaign(source: str, overrides: Mapping[str, Any]) -> Campaign:
    """Read a spec or a grid. `overrides` are options of the command line, over the file's.

    Raises InputError naming every bad field of the first combination that is not a spec.
    """
    values = read_mapping(source)
    name = str(values.pop("campaign", "") or (Path(source).stem if source != "-" else "probe"))
    order = values.pop("order", "teach")
    if order not in ("teach", "file"):
        raise InputError(Problem("order", "is not known", order, "teach, file"))
    common = {key: values.pop(key) for key in list(values) if key not in ("grids",)}
    tables = values.pop("grids", None)
    blocks = tables if tables is not None else [{}]
    if not isinstance(blocks, list):
        raise InputError(Problem("grids", "is not a list of tables", blocks))
    points: dict[str, Point] = {}
    for block in blocks:
        for point in _points(_merged(common, block), overrides, name):
            points.setdefault(point.key, point)
    if not points:
        raise InputError(Problem("grid", "asks for no probe", source))
    return Campaign(name, tuple(points.values()), order == "file")


def _points(block: dict[str, Any], overrides: Mapping[str, Any], name: str) -> Iterator[Point]:
    block.pop("about", None)
    priority = block.pop("priority", 0)
    grid = block.pop("grid", {})
    rows = block.pop("points", [{}])
    given = {**block.pop("options", {}), **{k: block.pop(k) for k in _OPTIONS if k in block}}
    options = _options({**given, **overrides})
    if not isinstance(grid, Mapping) or not all(isinstance(v, list) for v in grid.values()):
        raise InputError(Problem("grid", "is not a table of lists", grid))
    for row in rows:
        for combination in itertools.product(*grid.values()):
            values = nested({**block, **row, **dict(zip(grid, combination, strict=True))})
            own = {k: values.pop(k) for k in _OPTIONS if k in values}
            point_options = _options({**given, **own, **overrides}) if own else options
            spec = spec_from_mapping(values)
            key = probe_key(spec, point_options)
            yield Point(key, spec, point_options, int(priority), name)


def nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """{"lora.rank": 8} -> {"lora": {"rank": 8}}, later names over earlier ones."""
    result: dict[str, Any] = {}
    for name, value in flat.items():
        place = result
        *parents, last = name.split(".")
        for parent in parents:
            place[parent] = dict(place.get(parent, {}))
            place = place[parent]
        if isinstance(value, Mapping) and isinstance(place.get(last), Mapping):
            value = {**place[last], **value}
        place[last] = value
    return result


def _merged(common: Mapping[str, Any], block: Mapping[str, Any]) -> dict[str, Any]:
    """The block over the common fields; option and grid tables are merged by key."""
    merged = {**common, **block}
    for key in ("grid", "options", "lora"):
        if isinstance(common.get(key), Mapping) and isinstance(block.get(key), Mapping):
            merged[key] = {**common[key], **block[key]}
    return merged


def _options(values: Mapping[str, Any]) -> Options:
    unknown = [key for key in values if key not in _OPTIONS]
    if unknown:
        raise InputError([
            Problem(f"options.{key}", "is not an option", None, ", ".join(_OPTIONS),
                    nearest_name(key, _OPTIONS))
            for key in unknown
        ])  # fmt: skip
    try:
        options = Options(**values)
    except ValidationError as error:
        raise InputError([
            Problem(f"options.{e['loc'][0]}", e["msg"], e["input"]) for e in error.errors()
        ]) from None  # fmt: skip
    if not 0 <= options.warmup_steps < options.steps:
        message = "must be fewer than steps, so that something is timed"
        raise InputError(Problem("options.warmup_steps", message, options.warmup_steps))
    return options
