"""What each known dataset's columns mean: instruction samples and four-choice questions.

Columns as the published files have them: bertin-project/alpaca-spanish; openai/MMMLU ES_LA;
CohereForAI/Global-MMLU; cais/mmlu; pictures with instructions or choices (ScienceQA's names).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from planner.errors import InputError, Problem, nearest_name
from recipes.data.tables import Row, Table
from recipes.evaluation.questions import LETTERS, Question

TRAINING: dict[str, tuple[str, ...]] = {
    "images": ("image", "instruction", "output"),
    "alpaca": ("instruction", "input", "output"),
}
QUESTIONS: dict[str, tuple[str, ...]] = {
    "mmmlu": ("Question", "A", "B", "C", "D", "Answer", "Subject"),
    "global_mmlu": (
        "question", "option_a", "option_b", "option_c", "option_d", "answer", "subject",
    ),
    "images": ("image", "question", "choices", "answer"),
    "mmlu": ("question", "subject", "choices", "answer"),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Sample:
    """One instruction, its input (may be empty), its answer, and its image where it has one: a
    file's path or its bytes."""

    instruction: str
    input: str
    output: str
    image: str | bytes | None = None


_Parsed = TypeVar("_Parsed")


class BadRowError(ValueError):
    """A row that is not what its columns promise."""


def samples_of(table: Table, format: str = "auto", field: str = "data") -> list[Sample]:
    """Every row as a sample. Raises InputError by column, and by row for the first bad ones."""
    schema(table, TRAINING, format, field)
    return each_row(table, lambda row: _sample(row, table.folder), field)


def questions_of(table: Table, format: str = "auto", field: str = "evaluation") -> list[Question]:
    """Every row as a question. Raises InputError as `samples_of` does."""
    name = schema(table, QUESTIONS, format, field)
    parse = {"mmmlu": _mmmlu, "global_mmlu": _global_mmlu, "mmlu": _mmlu, "images": _mmlu}[name]
    return each_row(table, lambda row: parse(row, table.folder), field)


def schema(table: Table, known: dict[str, tuple[str, ...]], format: str, field: str) -> str:
    """The name of the schema that the columns fit; InputError by missing column otherwise."""
    columns = set(table.columns)
    if format == "auto":
        fitting = [name for name, wanted in known.items() if columns >= set(wanted)]
        if fitting:
            return fitting[0]
        format = max(reversed(known), key=lambda name: len(columns & set(known[name])))
    missing = [column for column in known[format] if column not in columns]
    if missing:
        have = ", ".join(table.columns)
        raise InputError(
            Problem(f"{field}.{column}", f"a column that the {format} format needs is missing",
                    have, ", ".join(known[format]), nearest_name(column, columns))
            for column in missing
        )  # fmt: skip
    return format


def each_row(
    table: Table, parse: Callable[[Row], _Parsed], field: str, told: int = 5
) -> list[_Parsed]:
    """Every row parsed. Raises InputError with the first `told` that raise BadRowError."""
    parsed, problems = [], []
    for number, row in enumerate(table.rows, start=1):
        try:
            parsed.append(parse(row))
        except BadRowError as error:
            problems.append(Problem(f"{field} row {number}", str(error)))
    if problems:
        if len(problems) > told:
            rest = Problem(field, f"and {len(problems) - told} more bad rows")
            problems = [*problems[:told], rest]
        raise InputError(problems)
    return parsed


def _sample(row: Row, folder: Path | None) -> Sample:
    image = image_of(row.get("image"), folder)
    return Sample(
        _text(row, "instruction"), _text(row, "input", empty=True) if "input" in row else "",
        _text(row, "output"), image,
    )  # fmt: skip


def _mmmlu(row: Row, folder: Path | None) -> Question:
    options = tuple(_text(row, letter) for letter in LETTERS)
    answer = _letter(row, "Answer")
    return Question(_text(row, "Question"), options, answer, _text(row, "Subject"))  # type: ignore[arg-type]


def _global_mmlu(row: Row, folder: Path | None) -> Question:
    options = tuple(_text(row, f"option_{letter.lower()}") for letter in LETTERS)
    answer = _letter(row, "answer")
    return Question(_text(row, "question"), options, answer, _text(row, "subject"))  # type: ignore[arg-type]


def _mmlu(row: Row, folder: Path | None) -> Question:
    choices = row["choices"]
    if not isinstance(choices, list) or len(choices) != len(LETTERS):
        raise BadRowError(f"choices are not four (got {choices!r})")
    answer = row["answer"]
    if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < len(choices):
        raise BadRowError(f"answer is not 0 to 3 (got {answer!r})")
    image = image_of(row.get("image"), folder)
    options = tuple(str(choice) for choice in choices)
    return Question(_text(row, "question"), options, answer, str(row.get("subject", "")), image)  # type: ignore[arg-type]


def _text(row: Row, column: str, empty: bool = False) -> str:
    value = row.get(column)
    if value is None and empty:
        return ""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        value = str(value)  # options such as 4 are numbers in some files
    if not isinstance(value, str):
        raise BadRowError(f"{column} is not text (got {value!r})")
    if not empty and not value.strip():
        raise BadRowError(f"{column} is empty")
    return value


def _letter(row: Row, column: str) -> int:
    value = row.get(column)
    letter = value.strip().upper() if isinstance(value, str) else None
    if letter not in LETTERS:
        raise BadRowError(f"{column} is not one of A, B, C, D (got {value!r})")
    return LETTERS.index(letter)


def image_of(value: Any, folder: Path | None) -> str | bytes | None:
    """An image column's path or bytes, also out of the Hub's {"bytes", "path"}; None stays None.
    Raises BadRowError."""
    if value is None:
        return None
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes):
        return value
    if not isinstance(value, str):
        if hasattr(value, "save"):  # a decoded picture, as `datasets` hands it over
            return _encoded(value)
        raise BadRowError(f"image is neither a path nor bytes (got {type(value).__name__})")
    path = Path(value) if folder is None else folder / value
    if not path.is_file():
        raise BadRowError(f"image file {value!r} does not exist")
    return str(path)


def _encoded(picture: Any) -> bytes:
    import io

    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return buffer.getvalue()
