"""Other tools' estimates for the measured rows, read from the table that `probes.others` writes,
and their errors beside the planner's on the very same rows."""

from __future__ import annotations

import csv
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from planner.errors import InputError, Problem
from planner.learn import spread_of
from planner.meters import range_error
from planner.models.registry import load_model
from planner.residuals import Residual

FIELDS = (
    "tool", "version", "key", "model", "quantity", "status", "estimate_bytes",
    "measured_low_bytes", "measured_bytes", "error", "words",
)  # fmt: skip
_QUANTITIES = {
    "device": "what the card must have: required + outside the allocator",
    "allocated": "peak allocated (the tool's parts without its overhead)",
    "weights": "resident before the first step",
}
_SHORT = {"device": "the card", "allocated": "allocated"}
_NOISE = 5e-4  # what the report prints as 0.0%: rounding, not a figure that is too low
_QUOTED = re.compile(r"(?<=')[^']+(?=')")  # a model's or an option's name: one line for all


class ToolRow(NamedTuple):
    """One tool's answer about one record. estimate_bytes None where it refused or has no such
    option; measured between measured_low_bytes and measured_bytes."""

    tool: str
    version: str
    key: str
    model: str
    quantity: str
    status: str
    estimate_bytes: int | None
    measured_low_bytes: int
    measured_bytes: int
    words: str

    @property
    def error(self) -> float | None:
        """0 inside the measured range, else the relative distance to its nearer end."""
        if self.estimate_bytes is None:
            return None
        return range_error(self.estimate_bytes, self.measured_low_bytes, self.measured_bytes)

    def as_dict(self) -> dict[str, Any]:
        error = self.error
        return {**self._asdict(), "error": None if error is None else round(error, 5)}


def read_tools(path: Path) -> list[ToolRow]:
    """The rows of the table; InputError where it is not one."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            return [_row(entry) for entry in csv.DictReader(file)]
    except (OSError, KeyError, ValueError) as error:
        problem = f"is not a table of `python -m probes.others`: {error!r}"
        raise InputError(Problem("other tools", problem, str(path))) from None


def _row(entry: dict[str, str]) -> ToolRow:
    estimate = entry["estimate_bytes"]
    return ToolRow(
        entry["tool"], entry["version"], entry["key"], entry["model"], entry["quantity"],
        entry["status"], int(estimate) if estimate else None, int(entry["measured_low_bytes"]),
        int(entry["measured_bytes"]), entry["words"],
    )  # fmt: skip


def tools_table(tools: Sequence[ToolRow], rows: Iterable[Residual]) -> str:
    """A line a tool and quantity: its errors, ours on the rows it answered, and what it refused."""
    by_key = {row.measured.key: row for row in rows}
    known = [
        row
        for row in tools
        if row.key in by_key
        and not (row.quantity == "device" and by_key[row.key].measured.spec.evaluation_batch_size)
    ]
    lines = [
        "| tool | against | answered | median | worst | bias | too low | vramwise on these rows: "
        "median, worst, too low | refused | no option for it |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, quantity in dict.fromkeys((row.tool, row.quantity) for row in known):
        asked = [row for row in known if (row.tool, row.quantity) == (name, quantity)]
        lines.append(_line(f"{name} {asked[0].version}", quantity, asked, by_key))
    return "\n".join(lines)


def _line(name: str, quantity: str, asked: list[ToolRow], by_key: dict[str, Residual]) -> str:
    answered = [row for row in asked if row.estimate_bytes is not None]
    status = Counter(row.status for row in asked)
    cells = ["-"] * 5
    if answered:
        middle, worst, bias = spread_of(_errors(answered))
        low = sum(error < -_NOISE for error in _errors(answered))
        own = [own_error(row, by_key[row.key]) for row in answered]
        ours = spread_of(own)
        own_low = sum(error < -_NOISE for error in own)
        cells = [f"{middle:.1%}", f"{worst:.1%}", f"{bias:+.1%}", f"{low}",
                 f"{ours[0]:.2%}, {ours[1]:.2%}, {own_low}"]  # fmt: skip
    return (
        f"| {name} | {_QUANTITIES[quantity]} | {len(answered)} | {' | '.join(cells)} "
        f"| {status['refused']} | {status['not offered']} |"
    )


def _errors(rows: Iterable[ToolRow]) -> list[float]:
    return [error for row in rows if (error := row.error) is not None]


def own_error(row: ToolRow, ours: Residual) -> float:
    """The planner's error against the same measured figure."""
    predicted = {
        "device": ours.predicted.device_required_bytes,
        "allocated": ours.predicted.peak_allocated_bytes,
        "weights": ours.predicted.resident_bytes,
    }[row.quantity]
    return range_error(predicted, row.measured_low_bytes, row.measured_bytes)


def families_table(tools: Sequence[ToolRow], rows: Iterable[Residual]) -> str:
    """Median errors by family, a column a tool; "refused" where it answered no row of one."""
    family = {row.measured.key: load_model(row.measured.spec.model).model_type for row in rows}
    known = [
        row
        for row in tools
        if row.key in family and row.quantity != "weights" and row.status != "not offered"
    ]
    columns = list(dict.fromkeys((row.tool, row.quantity) for row in known))
    titles = [f"{tool}, {_SHORT[quantity]}" for tool, quantity in columns]
    lines = [f"| | {' | '.join(titles)} |", "| --- |" + " --- |" * len(columns)]
    for name in sorted(set(family.values())):
        cells = []
        for column in columns:
            asked = [
                row for row in known
                if (row.tool, row.quantity) == column and family[row.key] == name
            ]  # fmt: skip
            errors = _errors(asked)
            told = "refused" if asked else "-"
            cells.append(f"{spread_of(errors)[0]:.1%} ({len(errors)})" if errors else told)
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def refusals(tools: Sequence[ToolRow], rows: Iterable[Residual]) -> str:
    """What each tool refused, in its own words, with how many rows."""
    keys = {row.measured.key for row in rows}
    found = Counter(
        (row.tool, row.status, _QUOTED.sub("…", row.words, count=1))
        for row in {(row.tool, row.key): row for row in tools if row.key in keys}.values()
        if row.status != "answered" and row.words
    )
    lines = ["| tool | rows | what it says |", "| --- | --- | --- |"]
    for (tool, status, words), count in sorted(found.items()):
        said = f"“{words}”" if status == "refused" else words
        lines.append(f"| {tool} | {count} | {said.replace('|', '/')} |")
    return "\n".join(lines) if found else "None."
