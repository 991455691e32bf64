"""Outlier columns against those that bitsandbytes found on an H200 (results/outliers), and what
must always hold of their number."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.estimate import estimate
from planner.memory.outliers import OutlierModel, outlier_model
from planner.models.registry import load_model
from planner.spec import spec_from_mapping

MEASURED = Path(__file__).parents[3] / "results/outliers/nvidia-h200.jsonl"
ROWS = [json.loads(line) for line in MEASURED.read_text(encoding="utf-8").splitlines()]
INT8 = spec_from_mapping({"model": "facebook/chameleon-7b", "quantization": "int8"})


@pytest.mark.parametrize("row", ROWS, ids=lambda r: f"{r['model']}-{r['micro_batch_size']}")
def test_columns_are_those_that_were_counted(row: dict) -> None:
    text = load_model(row["model"]).text
    model = outlier_model(INT8, text)
    assert model is not None
    found = model.columns(
        "layers.0.mlp.down_proj", row["in_features"], text.hidden_size,
        row["micro_batch_size"], row["sequence_length"],
    )  # fmt: skip
    assert found == pytest.approx(np.mean(row["columns"]), rel=0.035)


@settings(max_examples=25, deadline=None)
@given(
    hidden=st.sampled_from([1024, 2048, 3072, 4096, 8192]), normed=st.booleans(),
    batch=st.integers(1, 16), length=st.integers(16, 4096),
)  # fmt: skip
def test_more_samples_never_have_fewer(hidden: int, normed: bool, batch: int, length: int) -> None:
    model = OutlierModel(hidden, hidden, 16, normed)
    width = 3 * hidden
    found = [model.columns("mlp.down_proj", width, hidden, b, length) for b in (batch, batch + 1)]
    assert 0 <= found[0] <= found[1] <= width
    assert model.columns("mlp.up_proj", hidden, width, batch, length) == 0


def test_many_sizes_at_once_are_each_of_them() -> None:
    model = OutlierModel(4096, 4096, 32, True)
    batches, lengths = np.array([1, 2, 4]), np.array([512, 256, 128])
    found = model.columns("down_proj", 11008, 4096, batches, lengths)
    alone = [
        model.columns("down_proj", 11008, 4096, int(b), int(n))
        for b, n in zip(batches, lengths, strict=True)
    ]
    assert found.tolist() == alone


def test_few_outliers_take_less_and_none_are_counted_elsewhere() -> None:
    values = {"model": "facebook/chameleon-7b", "device": "h200", "quantization": "int8",
              "micro_batch_size": 4}  # fmt: skip
    many, few = (
        estimate(spec_from_mapping({**values, "int8_outliers": name})) for name in ("many", "few")
    )
    assert many.peak_allocated_bytes > 1.02 * few.peak_allocated_bytes
    assert many.resident_bytes == few.resident_bytes
    assert any("--int8-outliers few" in note for note in many.notes)
    assert outlier_model(few.spec, load_model("facebook/chameleon-7b").text) is None
