"""Listing and exporting the shipped records, against the JSON lines themselves."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest

from planner.errors import InputError
from probes.records_cli import run

STORE = Path(__file__).parents[2] / "results" / "records"


def raw() -> list[dict]:
    lines = [x for p in STORE.rglob("*.jsonl") for x in p.read_text("utf-8").splitlines()]
    return list({r["key"]: r for r in map(json.loads, lines)}.values())


@pytest.mark.parametrize("suffix", [".csv", ".parquet", ".json"])
def test_export_keeps_every_byte(tmp_path: Path, suffix: str) -> None:
    out = tmp_path / f"r{suffix}"
    assert run(["--store", str(STORE), "--out", str(out)]) == 0
    readers = {".csv": pd.read_csv, ".parquet": pd.read_parquet, ".json": pd.read_json}
    table = readers[suffix](out).set_index("key")
    assert len(table) == len(raw())
    for record in raw():
        meters = record.get("meters")
        if meters is not None:
            row = table.loc[record["key"]]
            assert int(row["peak_allocated_bytes"]) == meters["peak_allocated_bytes"]
            assert (
                int(row["load.peak_allocated_bytes"])
                == (meters["phases"]["load"]["peak_allocated_bytes"])
            )
            if "capacity" in meters:
                assert int(row["required_bytes"]) == meters["capacity"]["passed_cap_bytes"]


def test_filter_keeps_what_matches(tmp_path: Path) -> None:
    out = tmp_path / "r.csv"
    conditions = ["--where", "lora.target_modules=lm_head", "--where", "micro_batch_size=16"]
    run(["--store", str(STORE), *conditions, "--out", str(out)])
    wanted = [
        r["key"]
        for r in raw()
        if r["spec"]["lora"]["target_modules"] == ["lm_head"]
        and r["spec"]["micro_batch_size"] == 16
    ]
    assert wanted
    assert sorted(pd.read_csv(out)["key"]) == sorted(wanted)


def test_markdown_has_a_line_a_record(tmp_path: Path) -> None:
    out = tmp_path / "r.md"
    run(["--store", str(STORE), "--out", str(out)])
    assert len(out.read_text("utf-8").splitlines()) == len(raw()) + 2


def test_unknown_field_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(InputError, match="did you mean 'micro_batch_size'"):
        run(["--store", str(STORE), "--where", "micro_batch=16"])


def test_broken_line_is_told_and_the_rest_is_listed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = next(STORE.rglob("measured-rows.jsonl"))
    lines = source.read_text("utf-8").splitlines()
    (tmp_path / "a.jsonl").write_text("\n".join([lines[0], lines[1][:50], lines[2]]), "utf-8")
    assert run(["--store", str(tmp_path)]) == 1
    said = capsys.readouterr()
    assert "a.jsonl:2" in said.err
    assert said.out.count("chameleon-7b") == 2
