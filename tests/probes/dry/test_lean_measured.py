"""The traced lean stack against every lean step measured on an H200 (results/records): peaks
allocated within 0.1 %, the smallest cap within 1 % of the measured bracket."""

from __future__ import annotations

from pathlib import Path

import pytest

from probes.dry.accuracy import compare
from probes.records import Record
from probes.store import latest, read

RECORDS = Path(__file__).parents[3] / "results/records/nvidia-h200"
ROWS = [r for r in latest(read(RECORDS)[0]) if r.campaign == "lean" and r.outcome == "ok"]


def test_there_are_records() -> None:
    assert len(ROWS) >= 12


@pytest.mark.slow
@pytest.mark.parametrize("record", ROWS, ids=[r.key for r in ROWS])
def test_lean_peaks_are_those_of_the_card(record: Record) -> None:
    row = compare(record)
    assert row.unknown == ""
    for residue, band in ((row.resident, 1e-4), (row.peak_allocated, 1e-3), (row.required, 0.01)):
        assert residue is not None
        assert abs(residue) < band
