"""A sweep: every combination once, each row what `fit` answers, five formats with the same rows."""

from __future__ import annotations

import csv
import json
import random
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from planner.cli import main
from planner.errors import InputError, VramwiseError
from planner.estimate import estimate
from planner.levers import apply
from planner.sweep import IMPOSSIBLE, Row, evaluate, evaluate_grid
from planner.sweep_grid import Axis, Grid, grid_from_mapping
from tests.planner.tiny import tiny_spec

FIGURES = {
    "resident_bytes": "resident_bytes", "peak_allocated_bytes": "peak_allocated_bytes",
    "allocator_required_bytes": "allocator_required_bytes",
    "device_required_bytes": "device_required_bytes", "device_total_bytes": "device_total_bytes",
    "step_seconds": "step_seconds", "tokens_per_second": "tokens_per_second",
    "verdict": "verdict", "basis": "basis",
}  # fmt: skip

AXES: dict[str, list[Any]] = {
    "micro_batch_size": [1, 3, 8],
    "sequence_length": [64, 200, 513],
    "lora.rank": [4, 64],
    "gradient_accumulation_steps": [1, 2, 5],
    "gradient_checkpointing": [False, True],
    "quantization": ["none", "nf4", "int8"],
    "optimizer": ["adamw_torch", "paged_adamw_8bit", "galore_adamw", "adamw_torch_xla"],
    "device": ["rtx-3090", "h200", "t4"],
    "expandable_segments": [False, True],
    "evaluation_batch_size": [0, 2],
    "images_per_sample": [0, 1],
}


def _grid(model: str, axes: dict[str, list[Any]], **fields: Any) -> Grid:
    nested: dict[str, Any] = {}
    for name, values in axes.items():
        outer, _, inner = name.partition(".")
        if inner:
            nested.setdefault(outer, {})[inner] = values
        else:
            nested[outer] = values
    return grid_from_mapping({"model": model, "device": "rtx-3090", **fields, "grid": nested})


def _assert_is_fit(row: Row, grid: Grid) -> None:
    spec = apply(grid.base, dict(zip([axis.name for axis in grid.axes], row.values, strict=True)))
    if row.verdict == IMPOSSIBLE:
        with pytest.raises(VramwiseError) as refused:
            estimate(spec)
        assert row.reason == str(refused.value)
        assert row.device_required_bytes is None
        return
    answer = estimate(spec)
    for name, attribute in FIGURES.items():
        assert getattr(row, name) == getattr(answer, attribute), name
    low, high = answer.device_required_interval_bytes
    assert (row.device_required_low_bytes, row.device_required_high_bytes) == (low, high)


def test_every_combination_is_a_row_once(tiny: str) -> None:
    axes = {name: AXES[name] for name in ("micro_batch_size", "device", "quantization")}
    rows = list(evaluate_grid(_grid(tiny, axes)))
    assert sorted(row.values for row in rows) == sorted(product(*axes.values()))


@pytest.mark.slow
def test_200_drawn_rows_equal_fit(tiny: str) -> None:
    draw = random.Random(20)
    checked = 0
    while checked < 200:
        axes = {name: draw.sample(values, min(len(values), draw.choice([1, 1, 2])))
                for name, values in AXES.items()}  # fmt: skip
        grid = _grid(tiny, axes)
        rows = list(evaluate_grid(grid))
        for row in draw.sample(rows, min(len(rows), 20)):
            _assert_is_fit(row, grid)
            checked += 1


def test_what_cannot_be_is_a_row_with_its_reason(tiny: str) -> None:
    grid = _grid(tiny, {"images_per_sample": [0, 1], "method": ["lora", "full"]})
    rows = {row.values: row for row in evaluate_grid(grid)}
    assert rows[0, "lora"].verdict == "fits"
    assert rows[1, "lora"].verdict == IMPOSSIBLE
    assert "images" in rows[1, "lora"].reason
    assert "full" in rows[0, "full"].reason  # nf4 weights cannot be trained


def test_evaluate_takes_specs_and_mappings_in_order(tiny: str) -> None:
    base = {"model": tiny, "device": "rtx-3090"}
    rows = list(evaluate([{**base, "micro_batch_size": 2}, {**base, "micro_batch_size": 0}, base]))
    assert [row.verdict for row in rows] == ["fits", IMPOSSIBLE, "fits"]
    assert "micro_batch_size" in rows[1].reason
    one, two = rows[2].device_required_bytes, rows[0].device_required_bytes
    assert one is not None
    assert two is not None
    assert one < two


@pytest.fixture
def written(tiny: str, tmp_path: Path) -> dict[str, Path]:
    grid = tmp_path / "grid.toml"
    grid.write_text(
        f'model = "{tiny}"\ndevice = "rtx-3090"\n[grid]\nmicro_batch_size = [1, 2, 400]\n'
        'images_per_sample = [0, 1]\nlora.target_modules = ["all-linear", ["q_proj", "v_proj"]]\n'
    )
    paths = {
        suffix: tmp_path / f"out.{suffix}" for suffix in ("csv", "json", "md", "tex", "parquet")
    }
    for path in paths.values():
        assert main(["sweep", str(grid), "--out", str(path)]) == 0
    assert not list(tmp_path.glob("*.partial"))
    return paths


def test_formats_hold_the_same_rows(written: dict[str, Path]) -> None:
    pandas = pytest.importorskip("pandas")
    with written["csv"].open(newline="") as file:
        as_csv = list(csv.DictReader(file))
    as_json = json.loads(written["json"].read_text())["rows"]
    as_parquet = pandas.read_parquet(written["parquet"]).to_dict("records")
    assert len(as_csv) == len(as_json) == len(as_parquet) == 12
    for line, entry, record in zip(as_csv, as_json, as_parquet, strict=True):
        assert list(line) == list(entry) == list(record)
        for name, value in entry.items():
            assert line[name] == ("" if value is None else str(value))
            assert record[name] == value or (value is None and pandas.isna(record[name]))
    assert any(entry["pareto"] for entry in as_json)
    lines = written["md"].read_text().splitlines()
    assert len(lines) == 2 + 12
    assert len({line.replace("\\|", "").count("|") for line in lines}) == 1


def test_latex_rows_have_every_column_and_nothing_unescaped(written: dict[str, Path]) -> None:
    text = written["tex"].read_text()
    begin, _, body = text.partition("\\begin{longtable}")
    assert "\\usepackage{booktabs}" in begin
    columns = body.partition("{")[2].partition("}")[0].count("l")
    rows = [line for line in body.splitlines() if line.endswith("\\\\")]
    assert len(rows) == 1 + 12
    for row in rows:
        assert row.replace("\\&", "").count("&") == columns - 1
        bare = row.replace("\\_", "").replace("\\&", "").replace("\\#", "").replace("\\%", "")
        assert not set(bare.removesuffix("\\\\").replace("\\textgreater{}", "")) & set("_#%$^~")


def test_pareto_rows_are_those_that_nothing_beats(written: dict[str, Path]) -> None:
    rows = [row for row in json.loads(written["json"].read_text())["rows"]
            if row["verdict"] in ("fits", "tight")]  # fmt: skip
    for row in rows:
        beaten = any(
            other["device_required_bytes"] <= row["device_required_bytes"]
            and other["tokens_per_second"] >= row["tokens_per_second"]
            and (other["device_required_bytes"], other["tokens_per_second"])
            != (row["device_required_bytes"], row["tokens_per_second"])
            for other in rows
        )
        assert row["pareto"] is not beaten


def test_grid_of_dotted_and_nested_names_is_one(tiny: str) -> None:
    nested = grid_from_mapping({"model": tiny, "grid": {"lora": {"rank": [4, 8]}}})
    dotted = grid_from_mapping({"model": tiny, "grid": {"lora.rank": [4, 8]}})
    assert nested == dotted
    assert nested.size == 2


def test_grid_that_is_too_large_is_refused(tiny: str) -> None:
    lists = {"micro_batch_size": list(range(1, 5001)), "sequence_length": list(range(1, 5001))}
    with pytest.raises(InputError, match="too many combinations"):
        grid_from_mapping({"model": tiny, "device": "rtx-3090", "grid": lists})


def test_host_memory_on_an_axis_of_a_large_grid_is_judged(tiny: str) -> None:
    grid = Grid(tiny_spec(tiny), (
        Axis("micro_batch_size", tuple(range(1, 22))),
        Axis("sequence_length", tuple(range(16, 56, 2))),
        Axis("host_memory", (1 << 30, 64 << 30)),
    ))  # fmt: skip
    verdicts = {row.values[2]: row.verdict for row in evaluate_grid(grid)}
    assert verdicts == {1 << 30: "does_not_fit", 64 << 30: "fits"}
