"""The judged statements of two write-ups as rows of text. Computes no figure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from planner.seeds import GB, Figures, Run, Statement
from planner.units import GIB

HEADER = ("", "claimed", "present", "where", "predicted", "measured", "verdict", "why they differ")
TITLES = {"A": "Chameleon in Spanish", "B": "LaVIN-lite"}


def seed_cells(row: Statement) -> list[str]:
    """One statement."""
    return [
        row.id, row.told, row.present, row.where,
        "; ".join(_figure(row, run, run.predicted) for run in row.runs),
        "; ".join(_figure(row, run, run.measured) for run in row.runs if run.measured is not None),
        _verdict(row), row.why,
    ]  # fmt: skip


def _verdict(row: Statement) -> str:
    if row.verdict is None:
        return {"yes": "present", "partly": "present in part"}.get(row.present, row.present)
    return f"{row.verdict} ({row.basis})" if row.basis else row.verdict


def _figure(row: Statement, run: Run, figures: Figures) -> str:
    """Predicted: of the card. Measured: of the allocator, on the card that is named."""
    is_measured = figures is run.measured
    size = figures.allocator_bytes if is_measured else figures.required_bytes
    if run.figure == "resident":
        size = figures.resident_bytes
    parts = [] if size is None else [f"{size / GIB:.2f} GiB ({size / GB:.1f} GB)"]
    if row.kind == "trains" and not is_measured:
        parts.append(f"{run.answer.parameters.trainable:,} trained")
    if row.kind in ("faster", "slower") and figures.tokens_per_second:
        parts.append(f"{figures.tokens_per_second:,.0f} tokens/s")
    return f"{run.label}: {', '.join(parts)}, {figures.card}"


def caption(seed: str) -> str:
    """What the columns are."""
    return (
        f"{TITLES[seed]}: every statement of the write-up in our words. Predicted: what the card "
        "must have free (for weights: what stays after loading). Measured: the smallest cap on "
        "torch's allocator that worked, on the card that is named. A verdict is measured where "
        "every figure that it needs is, with the context of the card in question beside it; else "
        "it is predicted."
    )


def summary(rows: Iterable[Statement]) -> str:
    """'20 holds; 11 does not hold; 9 cannot be judged; 23 present; ...' of both write-ups."""
    counts = Counter(row.verdict or _verdict(row) for row in rows)
    return "; ".join(f"{count} {name}" for name, count in counts.most_common())


def page(rows: Sequence[Statement]) -> str:
    """The Markdown page."""
    from planner.report.tables import markdown_table

    parts = ["# Two write-ups, judged\n\n", "Made by `vramwise seeds`. "]
    parts.append(f"{len(rows)} statements: {summary(rows)}.\n")
    for seed, title in TITLES.items():
        own = [seed_cells(row) for row in rows if row.id.startswith(seed)]
        parts += [f"\n## {seed}: {title}\n\n", *markdown_table(HEADER, own, caption(seed))]
    return "".join(parts)
