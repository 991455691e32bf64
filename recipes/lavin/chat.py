"""LaVIN's dialogue mix, `all_data.json`: {split: [rows]}, with and without pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from planner.errors import InputError, Problem, nearest_name
from recipes.data.schemas import BadRowError, each_row, schema
from recipes.data.tables import Row, Table, read_json
from recipes.lavin.prompts import Turn

COLUMNS = ("instruction", "answer", "image", "image_source", "options", "qid")


def read_chat(source: str, split: str = "train", field: str = "data.source") -> list[Turn]:
    """The rows of one split. A picture of source "sqa" is images/train/QID/image.png beside the
    file, any other images/train2014/COCO_train2014_NAME. Raises InputError by column and row."""
    path = Path(source).expanduser()
    path = path / "all_data.json" if path.is_dir() else path
    rows = _rows(path, split, field)
    columns = tuple(dict.fromkeys(key for row in rows for key in row))
    table = Table(rows, columns, str(path), path.parent)
    schema(table, {"lavin chat": COLUMNS}, "lavin chat", field)
    return each_row(table, lambda row: _turn(row, path.parent), field)


def _rows(path: Path, split: str, field: str) -> list[Row]:
    values = read_json(path, field)
    if not isinstance(values, dict) or not all(isinstance(v, list) for v in values.values()):
        raise InputError(Problem(field, "is not an object of lists, one a split", str(path)))
    if split not in values:
        raise InputError(Problem(f"{field}.split", "is not in the file", split, ", ".join(values),
                                 nearest_name(split, values)))  # fmt: skip
    if not values[split] or not all(isinstance(row, dict) for row in values[split]):
        raise InputError(Problem(f"{field}.{split}", "is not a list of objects, one at least"))
    rows: list[Row] = values[split]
    return rows


def _turn(row: Row, folder: Path) -> Turn:
    for column in ("instruction", "answer"):
        if not isinstance(row.get(column), str) or not row[column].strip():
            raise BadRowError(f"{column} is no text or empty (got {row.get(column)!r})")
    return Turn(row["instruction"], row["answer"], _picture(row, folder))


def _picture(row: dict[str, Any], folder: Path) -> str | None:
    name = row.get("image")
    if name is None:
        return None
    if not isinstance(name, str):
        raise BadRowError(f"image is no file name (got {name!r})")
    if row.get("image_source") == "sqa":
        path = folder / "images" / "train" / str(row.get("qid")) / "image.png"
    else:
        path = folder / "images" / "train2014" / f"COCO_train2014_{name}"
    if not path.is_file():
        raise BadRowError(f"image file {str(path.relative_to(folder))!r} does not exist")
    return str(path)
