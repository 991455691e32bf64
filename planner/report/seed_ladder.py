"""A published ladder as rows of text. Computes nothing but differences of what it is given."""

from __future__ import annotations

from collections.abc import Iterable

from planner.estimate import device_of
from planner.ladder import Rung
from planner.measured_ladder import Measured
from planner.report.text import WORD
from planner.seed_ladder import GB, SeedRung, source_of
from planner.spec import RunSpec
from planner.units import GIB

HEADER = (
    "change", "allocated", "allocator needs", "card needs", "saved", "verdict", "measured",
    "card needs, as published", "published", "prediction against it",
)  # fmt: skip


def seed_cells(rung: SeedRung) -> list[str]:
    """A rung: sizes in GiB, and beside the published figure in its own unit, GB."""
    row = rung.today.row
    if row.peak_allocated_bytes is None:
        return [rung.name, *[""] * 4, f"impossible: {row.reason}", *[""] * 4]
    sizes = (row.peak_allocated_bytes, row.allocator_required_bytes, row.device_required_bytes)
    return [
        rung.name,
        *(f"{(size or 0) / GIB:.2f}" for size in sizes),
        "" if rung.today.saved_bytes is None else f"{rung.today.saved_bytes / GIB:+.2f}",
        f"{WORD[row.verdict]} ({row.basis})",
        measured_cell(rung.measured),
        _then(rung.then),
        rung.published.quoted,
        "" if rung.off is None else "inside" if rung.off == 0 else f"{rung.off:+.0%}",
    ]


def measured_cell(measured: Measured | None) -> str:
    """'4.60 allocated, 4.70 needed, 5.20 with the driver (NVIDIA H200)', or 'predicted'."""
    if measured is None:
        return "predicted"
    if measured.ran_out:
        return f"out of memory ({measured.device})"
    parts = []
    if measured.allocated_bytes:
        parts.append(f"{measured.allocated_bytes / GIB:.2f} allocated")
    if measured.required_bytes:
        parts.append(f"{measured.required_bytes / GIB:.2f} needed")
        if measured.outside_bytes:
            whole = measured.required_bytes + measured.outside_bytes
            parts.append(f"{whole / GIB:.2f} with the driver's")
    return f"{', '.join(parts)} ({measured.device})"


def _then(rung: Rung) -> str:
    size = rung.row.device_required_bytes
    return f"impossible: {rung.row.reason}" if size is None else (
        f"{size / GIB:.2f} GiB ({size / GB:.1f} GB)"
    )  # fmt: skip


def seed_caption(spec: RunSpec) -> str:
    """What the columns are."""
    return (
        f"{spec.model} on the {device_of(spec).label}: one change a row, each on top of the row "
        f"above; sizes in GiB; {spec.sequence_length} tokens a sample, a picture among them except "
        "in a full fine-tune. The first columns are this project's stack "
        f'({spec.precision}, {spec.attention}); "as published" is fp16, eager attention and a '
        f"bitsandbytes that kept 4-bit inputs, beside what was published in GB "
        f"({source_of(spec.model)})."
    )


def seed_notes(rungs: Iterable[SeedRung]) -> str:
    """Why prediction and published figure differ, a line a rung."""
    lines = [f"- {rung.name}: {rung.why}\n" for rung in rungs]
    return "\nWhy they differ:\n\n" + "".join(lines) + "\nMade by `vramwise ladder MODEL`.\n"
