"""Figures that others published, each with its source and tolerance (results/published.csv).

Only rows that state model, method, batch, length, checkpointing and meter are used.
"""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from planner.estimate import estimate
from planner.published import difference, published_markdown, read_published, spec_of
from planner.units import GIB

FILE = Path(__file__).parents[2] / "results" / "published.csv"
ROWS = list(csv.DictReader(FILE.open(encoding="utf-8")))
TESTED = [row for row in ROWS if row["tolerance"]]


def test_rows_are_there_with_their_sources() -> None:
    assert len(TESTED) >= 8
    assert all(row["source"].startswith("https://") for row in ROWS)


@pytest.mark.parametrize("row", TESTED, ids=lambda row: f"{row['model']}-{row['figure']}")
def test_published_figure_within_its_tolerance(row: dict[str, str]) -> None:
    answer = estimate(spec_of(row))
    if row["figure"] == "trainable":
        assert answer.parameters.trainable == int(row["published"])
        return
    published = float(row["published"]) * GIB
    predicted = getattr(answer, row["figure"])
    assert predicted == pytest.approx(published, rel=float(row["tolerance"]))


def test_the_report_answers_what_is_stated_and_lists_the_rest() -> None:
    rows = [row for row in read_published(FILE) if row.spec is None or "Mistral" in row.model]
    text = published_markdown(rows)
    stated = next(row for row in rows if row.spec is not None)
    assert stated.spec is not None
    assert f"| {stated.published} |" in text
    assert f"| {difference(stated, estimate(stated.spec)):+.1%} |" in text
    unstated = [row for row in rows if row.spec is None]
    assert unstated
    assert all(row.not_predicted and row.unsaid for row in unstated)
    assert f"{sum(row.rows for row in unstated)} figures" in text


def test_a_difference_is_taken_to_what_the_meter_means() -> None:
    """nvidia-smi shows the process's reserved bytes and its context, not torch's live tensors."""
    rows = [row for row in read_published(FILE) if row.spec is not None]
    allocated = next(row for row in rows if row.figure == "peak_allocated_bytes")
    used = next(row for row in rows if row.figure == "device_used_bytes")
    assert allocated.spec == used.spec
    assert used.spec is not None
    answer = estimate(used.spec)
    assert difference(allocated, answer) == pytest.approx(
        answer.peak_allocated_bytes / GIB / float(allocated.published) - 1
    )
    expected = (answer.peak_reserved_bytes + answer.non_torch_bytes) / GIB / float(used.published)
    assert difference(used, answer) == pytest.approx(expected - 1)


def test_a_full_cards_reading_is_held_against_the_range_it_allows() -> None:
    """Mistral 7B, full, 8 x 4096: torch would reserve more than the A100 has, and nvidia-smi showed
    71.28 GiB: more than the requirement, less than the card."""
    rows = [row for row in read_published(FILE) if row.spec is not None]
    row = next(r for r in rows if r.figure == "device_used_bytes" and r.published == "71.28")
    assert row.spec is not None
    answer = estimate(row.spec)
    assert answer.peak_reserved_bytes + answer.non_torch_bytes > answer.device_total_bytes
    assert difference(row, answer) == 0
    above = row._replace(published="90")
    assert difference(above, answer) == pytest.approx(answer.device_total_bytes / GIB / 90 - 1)
    below = row._replace(published="50")
    assert difference(below, answer) == pytest.approx(answer.device_required_bytes / GIB / 50 - 1)
