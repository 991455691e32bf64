"""`vramwise table MODEL`: a requirement table for a write-up.

Rows are methods; columns are cards (--gpus a,b) or batch sizes (--batch-sizes 1,2,4, on --gpu).
Cells: GiB the card must have free, verdict, and whether measured, calibrated or analytic."""

from __future__ import annotations

import json
import sys

from planner.arguments import Arguments, Flag, parse_arguments
from planner.devices import find_device
from planner.errors import InputError, Problem, VramwiseError
from planner.report.tables import RENDERERS
from planner.report.text import WORD
from planner.requirements import Requirements, requirements
from planner.sweep import Row
from planner.units import GIB
from planner.verbs.output import FORMAT_FLAGS, chosen_format, write_text

FLAGS = (
    Flag("gpus", "cards for the columns, comma-separated", "NAMES"),
    Flag("batch-sizes", "micro batch sizes for the columns, comma-separated", "SIZES"),
    *FORMAT_FLAGS,
)
DEFAULT_CARDS = "rtx-3090,a100-40gb-pcie,a100-80gb-sxm,h100-80gb-sxm"


def run(arguments: list[str]) -> int:
    """Print or write the table. Exit code 0."""
    given = parse_arguments("table", arguments, FLAGS, description=str(__doc__))
    kind = chosen_format(given)
    sizes = _sizes(given)
    devices = [] if sizes else _devices(given)
    table = requirements(given.run_spec(), devices, sizes)
    if given.json:
        sys.stdout.write(json.dumps(_as_dict(table)) + "\n")
        return 0
    header = ("method", *table.columns)
    rows = [(name, *(cell(row) for row in cells)) for name, cells in table.rows]
    write_text("".join(RENDERERS[kind](header, rows, table.caption)), given)
    return 0


def cell(row: Row) -> str:
    """'12.5 fits (analytic)'."""
    if row.device_required_bytes is None:
        return f"impossible: {row.reason}"
    return f"{row.device_required_bytes / GIB:.1f} {WORD[row.verdict]} ({row.basis})"


def _sizes(given: Arguments) -> list[int]:
    text = given.given.get("batch_sizes")
    if not text:
        return []
    sizes = [int(part) if part.strip().isdecimal() else 0 for part in text.split(",")]
    if not all(0 < size <= 2**24 for size in sizes):
        given.problems.append(Problem("--batch-sizes", "are not sizes of a batch", text, "1,2,4"))
    if not given.fields.get(("device",)) and not given.given.get("spec"):
        given.problems.append(Problem("--gpu", "is needed beside --batch-sizes"))
    return sizes


def _devices(given: Arguments) -> list[str]:
    device = given.fields.get(("device",))
    names = (given.given.get("gpus") or device or DEFAULT_CARDS).split(",")
    for name in names:
        try:
            find_device(name.strip())
        except InputError as error:
            given.problems += error.problems
        except VramwiseError as error:
            given.problems.append(Problem("--gpus", str(error), name))
    return [name.strip() for name in names]


def _as_dict(table: Requirements) -> dict[str, object]:
    rows = []
    for name, cells in table.rows:
        figures = [{k: v for k, v in row._asdict().items() if k != "values"} for row in cells]
        rows.append({"method": name, "cells": dict(zip(table.columns, figures, strict=True))})
    return {"caption": table.caption, "rows": rows}
