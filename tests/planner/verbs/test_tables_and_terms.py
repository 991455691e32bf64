"""`explain`, `ladder` and `table`: views whose figures are those of `fit`."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from planner.cli import main
from planner.estimate import estimate
from planner.levers import apply
from tests.planner.tiny import tiny_spec


def _json(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    assert main([*arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_explain_lists_every_term_and_figure(tiny: str, capsys: pytest.CaptureFixture[str]) -> None:
    answer = estimate(tiny_spec(tiny))
    rows = _json(capsys, "explain", tiny, "--gpu", "rtx-3090")
    named = {row["name"]: row for row in rows}
    for figure in ("resident_bytes", "peak_allocated_bytes", "allocator_required_bytes",
                   "non_torch_bytes", "device_required_bytes", "headroom_bytes"):  # fmt: skip
        assert named[figure]["bytes"] == getattr(answer, figure)
        assert named[figure]["formula"]
        assert named[figure]["source"]
    terms = [row for row in rows if row["category"] != "figure"]
    assert sum(row["bytes"] for row in terms) == answer.peak_allocated_bytes


@pytest.mark.parametrize(("term", "expected"), [
    ("step_seconds", "launches"), ("optimizer", "adamw_torch_fused"), ("mlp", "704"),
    ("non_torch_bytes", "CUDA context"),
])  # fmt: skip
def test_explain_fills_in_the_numbers_of_one_term(
    tiny: str, term: str, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["explain", tiny, term, "--gpu", "rtx-3090"]) == 0
    text = capsys.readouterr().out
    assert expected in text
    assert "source: " in text


def test_explain_an_unknown_term_is_bad_input(
    tiny: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["explain", tiny, "gradeints", "--gpu", "rtx-3090"]) == 2
    assert "TERM" in capsys.readouterr().err


@pytest.mark.slow
def test_quoted_bytes_find_the_configuration_they_came_from(
    tiny: str, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = tiny_spec(tiny, quantization="none", micro_batch_size=8, sequence_length=2048)
    answer = estimate(spec)
    for meter, size in (("peak allocated", answer.peak_allocated_bytes),
                        ("allocator required", answer.allocator_required_bytes),
                        ("device required", answer.device_required_bytes)):  # fmt: skip
        rows = _json(capsys, "explain", tiny, "--gpu", "rtx-3090", "--bytes", str(size),
                     "--within", "0.0001")  # fmt: skip
        exact = [row for row in rows if row["bytes"] == size and row["meter"] == meter]
        wanted = ("--method lora --quantization none", "2048", "--micro-batch-size 8")
        assert any(all(part in row["flags"] for part in wanted) for row in exact)


def test_ladder_deltas_are_differences_of_fit(
    tiny: str, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = _json(capsys, "ladder", tiny, "--gpu", "rtx-3090", "--sequence-length", "512")
    assert [row["rung"] for row in rows][:2] == ["16 bits, full fine-tune", "8-bit AdamW"]
    assert len(rows) >= 9
    for below, row in pairwise(rows):
        assert row["saved_bytes"] == below["device_required_bytes"] - row["device_required_bytes"]
    assert rows[-1]["device_required_bytes"] < rows[0]["device_required_bytes"]


def test_ladder_of_a_file_climbs_its_own_rungs(
    tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "spec.toml"
    file.write_text(
        f'model = "{tiny}"\ndevice = "rtx-3090"\nquantization = "none"\nladder = [\n'
        '  {name = "4 bits", quantization = "nf4"}, {"lora.rank" = 4},\n]\n'
    )
    rows = _json(capsys, "ladder", "--spec", str(file))
    assert [row["rung"] for row in rows] == ["as given", "4 bits", "--lora-rank 4"]
    spec = tiny_spec(tiny, quantization="nf4", lora={"rank": 4})
    assert rows[-1]["device_required_bytes"] == estimate(spec).device_required_bytes
    file.write_text(f'model = "{tiny}"\ndevice = "rtx-3090"\nladder = [{{optimizer = "x"}}]\n')
    assert main(["ladder", "--spec", str(file)]) == 2


@pytest.mark.parametrize("columns", [
    ("--gpus", "rtx-3090,h200"), ("--gpu", "rtx-3090", "--batch-sizes", "1,32"),
])  # fmt: skip
def test_table_cells_are_those_of_fit(
    tiny: str, columns: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    table = _json(capsys, "table", tiny, *columns)
    assert len(table["rows"]) == 5
    assert "512 tokens" in table["caption"]
    last = table["rows"][-1]
    assert last["method"] == "LoRA, nf4"
    change = {"device": "h200"} if columns[0] == "--gpus" else {"micro_batch_size": 32}
    answer = estimate(apply(tiny_spec(tiny), change))
    cell = list(last["cells"].values())[-1]
    assert cell["device_required_bytes"] == answer.device_required_bytes
    assert cell["verdict"] == answer.verdict


@pytest.mark.parametrize("kind", ["md", "tex", "csv", "html"])
def test_tables_are_written_by_their_suffix(tiny: str, kind: str, tmp_path: Path) -> None:
    out = tmp_path / f"table.{kind}"
    assert main(["table", tiny, "--gpus", "rtx-3090,h200", "--out", str(out)]) == 0
    text = out.read_text()
    assert "does not fit" in text or "fits (" in text
    start = {"md": "Memory", "tex": "\\documentclass", "csv": "# Memory", "html": "<table>"}
    assert text.startswith(start[kind])
