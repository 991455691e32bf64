"""`vramwise seeds`: every statement of two write-ups with its verdict, as results/tables/seeds.md
and seeds.csv.

Predicted by this planner; measured where records (results/records) or rows of the ladder
(results/ladder) have the same settings. Outside a checkout, to standard output."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from planner.arguments import Flag, parse_arguments
from planner.errors import InputError, Problem
from planner.measured_ladder import RESULTS
from planner.report.seeds import HEADER, page, seed_cells, summary
from planner.report.tables import RENDERERS
from planner.seeds import Statement, statements

_FLAGS = (
    Flag("out", "the folder of seeds.md and seeds.csv (default: results/tables)", "FOLDER"),
    Flag("records", "a folder of records (default: results/records)", "FOLDER"),
    Flag("measured", "rows of recipes.lavin.measure (default: results/ladder)", "PATH"),
)


def run(arguments: list[str]) -> int:
    """Write both tables, or print JSON. Exit code 0."""
    given = parse_arguments("seeds", arguments, _FLAGS, (), description=str(__doc__))
    if given.fields or given.given.get("spec"):
        given.problems.append(Problem("arguments", "seeds takes no run spec"))
    records = Path(given.given["records"]) if given.given.get("records") else None
    if records is not None and not records.is_dir():
        given.problems.append(Problem("--records", "no such folder", str(records)))
    out = _folder(given.given.get("out"))
    given.check()
    rows = statements(records, given.given.get("measured"))
    if given.json:
        sys.stdout.write(json.dumps([_as_dict(row) for row in rows]) + "\n")
        return 0
    if out is None:
        sys.stdout.write(page(rows))
        return 0
    (out / "seeds.md").write_text(page(rows), encoding="utf-8")
    table = RENDERERS["csv"](HEADER, [seed_cells(row) for row in rows], None)
    (out / "seeds.csv").write_text("".join(table), encoding="utf-8")
    sys.stdout.write(f"{out / 'seeds.md'}, {out / 'seeds.csv'}: {len(rows)} statements: "
                     f"{summary(rows)}\n")  # fmt: skip
    return 0


def _folder(given: str | None) -> Path | None:
    folder = Path(given) if given else RESULTS / "tables"
    if folder.is_dir():
        return folder
    if given:
        raise InputError(Problem("--out", "no such folder", given))
    return None


def _as_dict(row: Statement) -> dict[str, Any]:
    id_, told, present, where, predicted, measured, _, why = seed_cells(row)
    return {
        "id": id_, "claimed": told, "present": present, "where": where, "predicted": predicted,
        "measured": measured, "verdict": row.verdict, "basis": row.basis, "why": why,
    }  # fmt: skip
