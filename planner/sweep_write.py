"""Writing a sweep: rows stream into a spool beside the output; a second pass adds the Pareto mark,
which only the whole sweep decides, and makes the file. Memory stays flat, the cost linear."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from planner.errors import InputError, MissingExtraError, Problem
from planner.pareto import pareto
from planner.report.tables import latex_table, markdown_row, plain_cell
from planner.sweep import Row

FORMATS = (".csv", ".json", ".md", ".tex", ".parquet")
FIGURES = Row._fields[1:]
_CHUNK = 4096


def output_format(path: str) -> str:
    """The suffix of a file that can be written; InputError names those that can."""
    suffix = Path(path).suffix.lower()
    if suffix not in FORMATS:
        raise InputError(Problem("--out", "is not a format", path, ", ".join(FORMATS)))
    if not Path(path).parent.is_dir():
        raise InputError(Problem("--out", "is in no folder that exists", path))
    if suffix == ".parquet":
        _pyarrow()
    return suffix


def write_sweep(
    path: str, names: Sequence[str], rows: Iterable[Row], base: dict[str, Any],
    tell: Callable[[int], None] = lambda count: None,
) -> int:  # fmt: skip
    """Write every row to `path`, in order; returns how many. `names` are the grid's axes."""
    suffix = output_format(path)
    spool = Path(f"{path}.partial")
    points: list[Any] = []
    group = [i for i, name in enumerate(names) if name in ("model", "device", "device_memory")]
    try:
        with spool.open("w", encoding="utf-8") as file:
            for row in rows:
                file.write(json.dumps([*map(_plain, row.values), *row[1:]]) + "\n")
                points.append(_point(row, group))
                tell(len(points))
        with spool.open(encoding="utf-8") as file:
            marked = zip(file, pareto(points), strict=True)
            values = ([*json.loads(line), mark] for line, mark in marked)
            header = [*names, *FIGURES, "pareto"]
            _WRITERS[suffix](Path(path), header, values, base)
    finally:
        spool.unlink(missing_ok=True)
    return len(points)


def _point(row: Row, group: Sequence[int]) -> tuple[Any, float, float] | None:
    """Rows that fit compete with those of their own model and card."""
    if row.verdict not in ("fits", "tight"):
        return None
    key = tuple(row.values[i] for i in group)
    return key, float(row.device_required_bytes or 0), float(row.tokens_per_second or 0)


def _plain(value: Any) -> Any:
    return ",".join(value) if isinstance(value, tuple) else value


def _csv(path: Path, header: list[str], rows: Iterator[list[Any]], base: dict[str, Any]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)


def _json(path: Path, header: list[str], rows: Iterator[list[Any]], base: dict[str, Any]) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write('{"spec": ' + json.dumps(base) + ',\n"rows": [')
        for index, row in enumerate(rows):
            file.write(",\n" if index else "\n")
            file.write(json.dumps(dict(zip(header, row, strict=True))))
        file.write("\n]}\n")


def _markdown(
    path: Path, header: list[str], rows: Iterator[list[Any]], base: dict[str, Any]
) -> None:  # fmt: skip
    with path.open("w", encoding="utf-8") as file:
        file.write(markdown_row(header) + markdown_row(["---"] * len(header)))
        for row in rows:
            file.write(markdown_row([plain_cell(n, v) for n, v in zip(header, row, strict=True)]))


def _latex(path: Path, header: list[str], rows: Iterator[list[Any]], base: dict[str, Any]) -> None:
    cells = ([plain_cell(n, v) for n, v in zip(header, row, strict=True)] for row in rows)
    with path.open("w", encoding="utf-8") as file:
        file.writelines(latex_table(header, cells, caption=None))


def _parquet(
    path: Path, header: list[str], rows: Iterator[list[Any]], base: dict[str, Any]
) -> None:  # fmt: skip
    arrow, parquet = _pyarrow()
    writer = None
    schema = None
    while chunk := list(islice(rows, _CHUNK)):
        columns = {name: [row[i] for row in chunk] for i, name in enumerate(header)}
        if schema is None:
            schema = arrow.schema([(name, _arrow_type(arrow, name, columns[name]))
                                   for name in header])  # fmt: skip
            schema = schema.with_metadata({"spec": json.dumps(base)})
            writer = parquet.ParquetWriter(path, schema)
        writer.write_table(arrow.table(columns, schema=schema))  # type: ignore[union-attr]
    if writer is not None:
        writer.close()


def _arrow_type(arrow: Any, name: str, values: Sequence[Any]) -> Any:
    if name.endswith("_bytes"):
        return arrow.int64()
    if name in ("step_seconds", "tokens_per_second"):
        return arrow.float64()
    if name in ("verdict", "reason", "basis"):
        return arrow.string()
    return arrow.array(values).type


def _pyarrow() -> tuple[Any, Any]:
    from importlib import import_module

    try:
        return import_module("pyarrow"), import_module("pyarrow.parquet")
    except ModuleNotFoundError:
        raise MissingExtraError("sweep", "train", "pyarrow") from None


_WRITERS: dict[str, Callable[[Path, list[str], Iterator[list[Any]], dict[str, Any]], None]] = {
    ".csv": _csv, ".json": _json, ".md": _markdown, ".tex": _latex, ".parquet": _parquet,
}  # fmt: skip
