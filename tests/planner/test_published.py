"""Figures that others published, each with its source and tolerance (data/published.csv).

Only rows that state model, method, batch, length, checkpointing and meter are used.
"""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from planner.estimate import estimate
from planner.spec import RunSpec, spec_from_mapping
from planner.units import GIB

ROWS = list(csv.DictReader((Path(__file__).parent / "data" / "published.csv").open()))


def _spec(row: dict[str, str]) -> RunSpec:
    fields: dict[str, object] = {
        name: row[name] for name in ("model", "device", "method", "quantization", "optimizer")
    }
    fields |= {name: int(row[name]) for name in ("micro_batch_size", "sequence_length")}
    fields["gradient_checkpointing"] = row["gradient_checkpointing"] == "true"
    if row["lora_rank"]:
        targets = row["lora_targets"].split()
        fields["lora"] = {"rank": int(row["lora_rank"]), "target_modules": targets, "dropout": 0.0}
    return spec_from_mapping(fields)


def test_rows_are_there_with_their_sources() -> None:
    assert len(ROWS) >= 8
    assert all(row["source"].startswith("https://") for row in ROWS)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row['model']}-{row['figure']}")
def test_published_figure_within_its_tolerance(row: dict[str, str]) -> None:
    answer = estimate(_spec(row))
    if row["figure"] == "trainable":
        assert answer.parameters.trainable == int(row["published"])
        return
    published = float(row["published"]) * GIB
    predicted = getattr(answer, row["figure"])
    assert predicted == pytest.approx(published, rel=float(row["tolerance"]))
