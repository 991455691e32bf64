"""ScienceQA as it is published: `problems.json` with `pid_splits.json` and an images folder, or the
Hub's columns in parquet or JSON (derek-thomas/ScienceQA)."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from planner.errors import InputError, Problem, nearest_name
from recipes.data.schemas import BadRowError, each_row, image_of, schema
from recipes.data.tables import Row, Table, read_json, read_table

COLUMNS = (
    "image", "question", "choices", "answer", "hint", "task", "grade", "subject", "topic",
    "category", "skill", "lecture", "solution",
)  # fmt: skip
LETTERS = ("A", "B", "C", "D", "E")
_SUBJECTS = {"natural science": "NAT", "social science": "SOC", "language science": "LAN"}
# The Hub's name of the original's split.
_HUB_SPLITS = {"val": "validation"}


@dataclass(frozen=True, slots=True)
class ScienceQuestion:
    """answer: index into choices; grade: 1 to 12; image: a file's path or bytes, None without;
    caption: of the image, where captions.json has one."""

    qid: str
    question: str
    choices: tuple[str, ...]
    answer: int
    hint: str
    image: str | bytes | None
    grade: int
    subject: str
    topic: str
    lecture: str
    solution: str
    caption: str = ""

    @property
    def letter(self) -> str:
        return LETTERS[self.answer]

    @property
    def categories(self) -> tuple[str, ...]:
        """The columns of ScienceQA's own table that the question counts in."""
        context = [name for name, has in (("TXT", self.hint.strip()), ("IMG", self.image)) if has]
        grades = "G1-6" if self.grade <= 6 else "G7-12"
        return (_SUBJECTS[self.subject], *(context or ["NO"]), grades, "AVG")


def read_scienceqa(source: str, split: str, field: str = "data.source") -> list[ScienceQuestion]:
    """One split ("train", "val", "test") of a folder in the original layout, or of what
    `recipes.data.tables` reads with the Hub's columns. Raises InputError by column and row."""
    folder = Path(source).expanduser()
    if (folder / "problems.json").is_file():
        table = _original(folder, split, field)
    elif folder.is_dir() and (folder / "problem.json").is_file():
        raise InputError(Problem(field, "no problems.json in this folder (there is a problem.json: "
                                 "rename it)", source))  # fmt: skip
    else:
        table = read_table(source, _HUB_SPLITS.get(split, split), field)
    schema(table, {"scienceqa": COLUMNS}, "scienceqa", field)
    questions = each_row(table, lambda row: _question(row, table.folder), field)
    return [q if q.qid else _numbered(q, index) for index, q in enumerate(questions)]


def _original(folder: Path, split: str, field: str) -> Table:
    """problems.json's entries of one split as rows, images as paths."""
    problems = _object(folder / "problems.json", field)
    splits = _object(folder / "pid_splits.json", field)
    if split not in splits:
        raise InputError(Problem(f"{field}.split", "is not in pid_splits.json", split,
                                 ", ".join(splits), nearest_name(split, splits)))  # fmt: skip
    missing = [qid for qid in splits[split] if qid not in problems]
    if missing:
        raise InputError(Problem(f"{field}.pid_splits", f"names {len(missing)} questions that "
                                 "problems.json lacks", missing[0]))  # fmt: skip
    captions = folder / "captions.json"
    texts = _object(captions, field).get("captions", {}) if captions.is_file() else {}
    rows = [_original_row(qid, problems[qid], split, texts) for qid in splits[split]]
    if not rows:
        raise InputError(Problem(field, "holds no questions of this split", split))
    _same_columns(rows, field)
    columns = (key for key in rows[0] if key not in ("qid", "caption"))
    return Table(rows, tuple(columns), str(folder), folder)


def _original_row(qid: str, problem: Row, split: str, captions: dict[str, str]) -> Row:
    """The problem with its image's path; minitrain's pictures lie under train."""
    row = dict(problem) | {"qid": qid, "caption": captions.get(qid, "")}
    if row.get("image") is not None:
        row["image"] = f"images/{problem.get('split', split)}/{qid}/{row['image']}"
    return row


def _same_columns(rows: list[Row], field: str) -> None:
    """A key that only some problems have is told by its name and how many lack it."""
    counts = Counter(key for row in rows for key in row)
    lacking = {name: len(rows) - counts[name] for name in COLUMNS if 0 < counts[name] < len(rows)}
    if lacking:
        raise InputError(
            Problem(f"{field}.{name}", f"is missing from {count} of {len(rows)} problems")
            for name, count in lacking.items()
        )


def _object(path: Path, field: str) -> dict[str, Any]:
    values = read_json(path, field)
    if not isinstance(values, dict):
        raise InputError(Problem(field, "is not a JSON object", str(path)))
    return values


def _question(row: Row, folder: Path | None) -> ScienceQuestion:
    choices, answer = row["choices"], row["answer"]
    if not isinstance(choices, list) or not 2 <= len(choices) <= len(LETTERS):
        raise BadRowError(f"choices are not 2 to {len(LETTERS)} (got {choices!r})")
    if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < len(choices):
        raise BadRowError(f"answer is not 0 to {len(choices) - 1} (got {answer!r})")
    if row["subject"] not in _SUBJECTS:
        raise BadRowError(f"subject is not one of {', '.join(_SUBJECTS)} (got {row['subject']!r})")
    image = image_of(row.get("image"), folder)
    texts = {name: _text(row, name) for name in ("hint", "topic", "lecture", "solution")}
    question = _text(row, "question")
    if not question.strip():
        raise BadRowError("question is empty")
    return ScienceQuestion(
        qid=str(row.get("qid", "")), question=question, choices=tuple(map(str, choices)),
        answer=answer, image=image, grade=_grade(row["grade"]), subject=row["subject"],
        caption=str(row.get("caption", "")), **texts,
    )  # fmt: skip


def _text(row: Row, column: str) -> str:
    value = row.get(column)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise BadRowError(f"{column} is not text (got {value!r})")
    return value


def _grade(value: Any) -> int:
    found = re.fullmatch(r"grade(\d{1,2})", value) if isinstance(value, str) else None
    if found is None or not 1 <= int(found.group(1)) <= 12:
        raise BadRowError(f"grade is not grade1 to grade12 (got {value!r})")
    return int(found.group(1))


def _numbered(question: ScienceQuestion, index: int) -> ScienceQuestion:
    from dataclasses import replace

    return replace(question, qid=str(index))
