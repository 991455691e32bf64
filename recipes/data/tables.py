"""Rows of a dataset: from parquet, CSV, JSON or JSON lines on disk, or from the Hub."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from planner.errors import InputError, Problem

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Table:
    """rows: one mapping a row; columns: the names that rows may have; origin: where it was read;
    folder: what relative image paths start from, None for the Hub."""

    rows: list[Row]
    columns: tuple[str, ...]
    origin: str
    folder: Path | None


def read_table(source: str, split: str = "train", field: str = "data.source") -> Table:
    """A file, a folder of files, or a dataset of the Hub. Raises InputError naming `field`."""
    path = Path(source).expanduser()
    if path.is_file():
        return _table(_rows(path, field), source, path.parent, field)
    if path.is_dir():
        return _table(_folder_rows(path, split, field), source, path, field)
    if path.suffix in _READERS or source.startswith((".", "/", "~")):
        raise InputError(Problem(field, "no such file or folder", source))
    return _table(_hub_rows(source, split, field), source, None, field)


def read_json(path: Path, field: str) -> Any:
    """What a JSON file holds. Raises InputError naming `field`."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        raise InputError(Problem(field, "no such file", str(path))) from None
    except ValueError as error:
        raise InputError(Problem(field, f"is not JSON: {error}", str(path))) from None


def _table(rows: list[Row], source: str, folder: Path | None, field: str) -> Table:
    if not rows:
        raise InputError(Problem(field, "holds no rows", source))
    return Table(
        rows, tuple(dict.fromkeys(key for row in rows[:100] for key in row)), source, folder
    )


def _folder_rows(folder: Path, split: str, field: str) -> list[Row]:
    files = sorted(p for p in folder.rglob("*") if p.suffix in _READERS)
    named = [p for p in files if split in p.stem or split in p.parent.name]
    if not files:
        allowed = ", ".join(_READERS)
        raise InputError(Problem(field, "no data file in this folder", str(folder), allowed))
    return [row for path in named or files for row in _rows(path, field)]


def _rows(path: Path, field: str) -> list[Row]:
    reader = _READERS.get(path.suffix)
    if reader is None:
        raise InputError(Problem(field, "unknown kind of file", path.name, ", ".join(_READERS)))
    try:
        return reader(path)
    except (OSError, ValueError, KeyError, csv.Error) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(Problem(field, f"cannot be read: {reason}", str(path))) from None


def _parquet(path: Path) -> list[Row]:
    import pyarrow.parquet

    return list(pyarrow.parquet.read_table(path).to_pylist())


def _csv(path: Path) -> list[Row]:
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file, strict=True)
        rows = list(reader)
    for number, row in enumerate(rows, start=2):
        if None in row or None in row.values():
            raise ValueError(f"line {number} has another number of fields than the header")
    return [{str(k): v for k, v in row.items()} for row in rows]


def _json(path: Path) -> list[Row]:
    values = json.loads(path.read_text(encoding="utf-8"))
    if isinstance(values, dict):
        values = next((v for v in values.values() if isinstance(v, list)), None)
    if not isinstance(values, list) or not all(isinstance(row, dict) for row in values):
        raise ValueError("is not a list of objects")
    return values


def _json_lines(path: Path) -> list[Row]:
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise ValueError(f"line {number}: {error}") from None
    return rows


_READERS: dict[str, Callable[[Path], list[Row]]] = {
    ".parquet": _parquet, ".csv": _csv, ".json": _json, ".jsonl": _json_lines,
}  # fmt: skip


def _hub_rows(name: str, split: str, field: str) -> list[Row]:
    import datasets

    name, _, subset = name.partition(":")
    try:
        return list(datasets.load_dataset(name, subset or None, split=split))
    except Exception as error:  # datasets raises its own, requests' and huggingface_hub's
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(
            Problem(field, f"neither on disk nor on the Hub: {reason}", name)
        ) from None
