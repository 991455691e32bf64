"""`vramwise calibrate --report`: the report, what lies beside it, and the README's section."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from planner.cli import main

RESULTS = Path(__file__).parents[3] / "results"


def _records(folder: Path, count: int = 3) -> Path:
    lines = [
        line
        for file in sorted((RESULTS / "records").rglob("*.jsonl"))
        for line in file.read_text(encoding="utf-8").splitlines()
        if '"outcome":"ok"' in line
    ]
    path = folder / "records.jsonl"
    path.write_text("\n".join(lines[:count]) + "\n", encoding="utf-8")
    return path


def test_one_command_writes_the_report_the_published_figures_and_the_readme(
    tmp_path: Path,
) -> None:
    with (RESULTS / "published.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    few = [next(r for r in rows if r["tolerance"] and r["unit"] == "GiB"),
           next(r for r in rows if r["not_predicted"])]  # fmt: skip
    figures = tmp_path / "published.csv"
    with figures.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(few)
    readme = tmp_path / "README.md"
    readme.write_text("<!-- accuracy: begin --><!-- accuracy: end -->", encoding="utf-8")
    report = tmp_path / "accuracy.md"
    arguments = ["calibrate", str(_records(tmp_path)), "--report", str(report),
                 "--readme", str(readme), "--published", str(figures)]  # fmt: skip
    others = ["--others", str(RESULTS / "tables" / "other-tools.csv")]
    assert main([*arguments, *others]) == 0
    assert "| fitcheck-llm" in report.read_text(encoding="utf-8")
    assert "| fitcheck-llm" in readme.read_text(encoding="utf-8")
    published = (tmp_path / "published.md").read_text(encoding="utf-8")
    assert f"| {few[0]['published']} |" in published
    assert few[1]["not_predicted"] in published


def test_without_other_tools_the_report_leaves_them_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["calibrate", str(_records(tmp_path, 1)), "--report", "accuracy.md"]) == 0
    text = (tmp_path / "accuracy.md").read_text(encoding="utf-8")
    assert "other tools" not in text
    assert not (tmp_path / "published.md").exists()


def test_a_table_of_others_that_is_named_must_be_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["calibrate", str(_records(tmp_path, 1)), "--report", str(tmp_path / "a.md"),
                 "--others", str(tmp_path / "none.csv")]  # fmt: skip
    assert main(arguments) == 2
    assert "none.csv" in capsys.readouterr().err
