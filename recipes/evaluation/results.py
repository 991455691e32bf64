"""An evaluation's results: counts with their intervals, comparisons, and the two CSV files."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from recipes.evaluation.questions import LETTERS, Question
from recipes.evaluation.scoring import Answer
from recipes.evaluation.statistics import above_chance, mcnemar_exact, wilson_interval

SEED_COLUMNS = (
    "Question", "Generated Answer (Testing)", "Correct Answer", "Is Correct", "Response Time (s)",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Summary:
    """questions, right and invalid counts; the accuracy's 95 % interval; the one-sided p-value
    against guessing; mean seconds an answer."""

    questions: int
    right: int
    invalid: int
    accuracy: float
    low: float
    high: float
    p_above_chance: float
    mean_seconds: float


def is_right(questions: Sequence[Question], answers: Sequence[Answer]) -> list[bool]:
    """An answer that is no letter is wrong."""
    return [a.index == q.answer for q, a in zip(questions, answers, strict=True)]


def summarise(questions: Sequence[Question], answers: Sequence[Answer]) -> Summary:
    """Raises ValueError without questions."""
    marks = is_right(questions, answers)
    low, high = wilson_interval(sum(marks), len(marks))
    return Summary(
        questions=len(marks), right=sum(marks),
        invalid=sum(answer.index is None for answer in answers),
        accuracy=sum(marks) / len(marks), low=low, high=high,
        p_above_chance=above_chance(sum(marks), len(marks)),
        mean_seconds=sum(answer.seconds for answer in answers) / len(answers),
    )  # fmt: skip


def compare(
    questions: Sequence[Question], base: Sequence[Answer], tuned: Sequence[Answer]
) -> float:
    """McNemar's exact two-sided p-value, base against tuned on the same questions."""
    return mcnemar_exact(is_right(questions, base), is_right(questions, tuned))


def write_seed_csv(path: Path, questions: Sequence[Question], answers: Sequence[Answer]) -> None:
    """The seed's own table: exactly its columns, one row a question."""
    rows = [
        (q.text, a.text, q.letter, a.index == q.answer, a.seconds)
        for q, a in zip(questions, answers, strict=True)
    ]
    _write(path, SEED_COLUMNS, rows)


def write_rich_csv(
    path: Path, questions: Sequence[Question], answers: Sequence[Answer], label: str
) -> None:
    """The seed's columns and more: subject, options, each letter's log-probability."""
    columns = (
        *SEED_COLUMNS, "Model", "Subject", *(f"Option {x}" for x in LETTERS),
        *(f"Log P({x})" for x in LETTERS), "Is Valid",
    )  # fmt: skip
    rows = [
        (
            q.text, a.text, q.letter, a.index == q.answer, a.seconds, label, q.subject, *q.options,
            *(a.log_probabilities or ("",) * len(LETTERS)), a.index is not None,
        )
        for q, a in zip(questions, answers, strict=True)
    ]  # fmt: skip
    _write(path, columns, rows)


def _write(path: Path, columns: Sequence[str], rows: Sequence[tuple[object, ...]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(rows)
