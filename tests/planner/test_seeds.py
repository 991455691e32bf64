"""Two write-ups judged: every statement has its row, its place here and, where figures decide, a
verdict that follows from them."""

from __future__ import annotations

import csv
import json
import re
from collections import Counter
from pathlib import Path

import pytest

from planner.cli import main
from planner.commands import COMMANDS
from planner.estimate import estimate
from planner.seeds import FAILS, HOLDS, OPEN, Statement, statements

ROOT = Path(__file__).resolve().parents[2]
# What the write-ups contain, numbered: 30 parts of the first, 14 of the second.
IDS = {*(f"A{number}" for number in range(1, 31)), *(f"B{number}" for number in range(1, 15))}
PRESENT = {"yes", "partly", "to come", "no place"}
# Statements of the first that must have verdicts of their own.
CLAIMS = ("79 GB for efficient", "16 GB quantised", "80 GB is optimal", "24 GB is insufficient",
          "several seconds", "several hours", "Paged optimizer: no clear effect")  # fmt: skip


@pytest.fixture(scope="module")
def rows() -> list[Statement]:
    return statements()


def test_no_statement_is_left_out(rows: list[Statement]) -> None:
    assert {row.id for row in rows} == IDS
    assert len(rows) == 67
    assert len({(row.id, row.told) for row in rows}) == len(rows)
    for words in CLAIMS:
        assert any(words in row.told and row.verdict for row in rows if row.id[0] == "A"), words


def test_every_row_says_where_it_stands_and_why(rows: list[Statement]) -> None:
    verbs = {command.verb for command in COMMANDS}
    for row in rows:
        assert row.present in PRESENT
        assert len(row.why) > 20, row
        assert bool(row.where) is (row.present in ("yes", "partly")), row
        for place in filter(None, row.where.split(", ")):
            verb = re.match(r"`vramwise (\w+)", place)
            assert (verb[1] in verbs) if verb else (ROOT / place).is_file(), place


def test_verdicts_of_every_kind_are_there(rows: list[Statement]) -> None:
    counts = Counter(row.verdict for row in rows)
    assert min(counts[HOLDS], counts[FAILS], counts[OPEN]) >= 5
    assert all(row.basis for row in rows if row.kind not in ("", "given"))


def test_figures_are_those_of_fit(rows: list[Statement]) -> None:
    runs = {run.name: run for row in rows for run in row.runs}
    assert len(runs) > 20
    for run in runs.values():
        required = estimate(run.spec).device_required_bytes
        assert run.predicted.required_bytes == required


def test_without_records_everything_is_predicted_and_little_changes(tmp_path: Path) -> None:
    bare = statements(tmp_path, tmp_path)
    assert {row.basis for row in bare} == {"", "predicted"}
    assert not any(run.measured for row in bare for run in row.runs)
    changed = [b.told for a, b in zip(statements(), bare, strict=True) if a.verdict != b.verdict]
    assert len(changed) <= 1, changed


def test_a_measured_verdict_rests_on_the_record(rows: list[Statement]) -> None:
    """LLaVA-13B in full: the record's own cap, read from its file."""
    path = ROOT / "results" / "records" / "nvidia-h200" / "write-ups.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    caps = [r["meters"]["capacity"]["passed_cap_bytes"] for r in records
            if r["spec"]["optimizer"] == "adamw_torch_fused"]  # fmt: skip
    row = next(row for row in rows if "LLaVA-13B runs out" in row.told)
    assert row.runs[0].measured is not None
    assert row.runs[0].measured.allocator_bytes in caps
    assert min(caps) > 85e9
    assert (row.verdict, row.basis) == (HOLDS, "measured")


def test_the_verb_writes_both_tables(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], rows: list[Statement]
) -> None:
    assert main(["seeds", "--out", str(tmp_path)]) == 0
    assert "67 statements" in capsys.readouterr().out
    page = (tmp_path / "seeds.md").read_text()
    assert len([line for line in page.splitlines() if re.match(r"\| [AB]\d", line)]) == len(rows)
    with (tmp_path / "seeds.csv").open() as file:
        written = list(csv.DictReader(file))
    assert [row["claimed"] for row in written] == [row.told for row in rows]
    assert all(row["verdict"] for row in written)
    assert main(["seeds", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)) == len(rows)


@pytest.mark.parametrize("arguments", [("--out", "/nowhere"), ("--records", "/nowhere"),
                                       ("--measured", "/nowhere"), ("--gpu", "h200")])  # fmt: skip
def test_what_is_not_there_is_named(
    arguments: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["seeds", *arguments]) == 2
    assert capsys.readouterr().err.startswith("error: ")
