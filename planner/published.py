"""Figures that others published, beside what the planner answers for the same run, and what each
source leaves unsaid (results/published.csv)."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from planner.answer import Estimate
from planner.errors import InputError, Problem
from planner.estimate import estimate
from planner.spec import RunSpec, spec_from_mapping
from planner.units import GIB

# What a published figure was read from. nvidia-smi shows what torch has reserved, which on a card
# with room to spare is more than it needs.
_METERS = {
    "peak_allocated_bytes": "torch peak allocated",
    "peak_reserved_bytes": "torch peak reserved",
    "device_used_bytes": "the card (nvidia-smi)",
    "unsaid": "not said",
}


class Published(NamedTuple):
    """A published figure: of one run that is stated well enough to be answered (`spec`), or of
    `rows` runs that are not, with the fields that are missing or what else they run."""

    model: str
    run: str
    spec: RunSpec | None
    figure: str
    published: str
    unsaid: str
    not_predicted: str
    rows: int
    source: str


def read_published(path: Path) -> list[Published]:
    """The file's rows; counts of parameters are for the tests and left out here."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            entries = list(csv.DictReader(file))
        return [_row(entry) for entry in entries if entry["unit"] == "GiB"]
    except (OSError, KeyError, ValueError) as error:
        problem = f"is not a table of published figures: {error!r}"
        raise InputError(Problem("published", problem, str(path))) from None


def spec_of(entry: dict[str, str]) -> RunSpec:
    """The run of a row that states it."""
    fields: dict[str, object] = {
        name: entry[name] for name in ("model", "device", "method", "quantization", "optimizer")
    }
    fields |= {name: int(entry[name]) for name in ("micro_batch_size", "sequence_length")}
    fields["gradient_checkpointing"] = entry["gradient_checkpointing"] == "true"
    if entry["lora_rank"]:
        named = entry["lora_targets"]
        targets = named if named == "all-linear" else named.split()
        fields["lora"] = {
            "rank": int(entry["lora_rank"]), "target_modules": targets, "dropout": 0.0,
        }  # fmt: skip
    return spec_from_mapping(fields)


def _row(entry: dict[str, str]) -> Published:
    spec = None if entry["not_predicted"] else spec_of(entry)
    words = [
        entry["method"], entry["quantization"],
        f"r={entry['lora_rank']} {entry['lora_targets']}" if entry["lora_rank"] else "",
        f"{entry['micro_batch_size'] or '?'} x {entry['sequence_length'] or '?'}",
        {"true": "checkpointed", "false": "plain"}.get(entry["gradient_checkpointing"], ""),
        entry["optimizer"], entry["device"],
    ]  # fmt: skip
    return Published(
        entry["model"], ", ".join(word for word in words if word), spec, entry["figure"],
        entry["published"], entry["unsaid"], entry["not_predicted"], int(entry["rows"] or 1),
        entry["source"],
    )  # fmt: skip


def published_markdown(rows: Sequence[Published]) -> str:
    """Two tables: what can be answered with the answer, and what cannot with what is missing."""
    stated = [row for row in rows if row.spec is not None]
    others = [row for row in rows if row.spec is None]
    parts = [
        "# Published figures of other cards",
        "Made by `vramwise calibrate results/records --report results/tables/accuracy.md` from "
        "results/published.csv. GiB. The prediction is for today's libraries, samples of full "
        "length, and LoRA without dropout where the source names none. `outside` is what lies "
        "beside torch's allocator. The difference is taken to the column that the source's meter "
        "means (nvidia-smi: reserved + outside, or 0 between required + outside and the card's "
        "size where that is more than the card has; none named: required + outside).",
        f"## Stated well enough to be answered: {len(stated)}",
        _answered(stated),
        f"## Not answered: {sum(row.rows for row in others)} figures, with what is missing",
        _unanswered(others),
    ]
    return "\n\n".join(parts) + "\n"


def _answered(rows: Sequence[Published]) -> str:
    lines = [
        "| model | run | meter | published | allocated | required | reserved | required + outside "
        "| reserved + outside | difference | left unsaid | source |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        assert row.spec is not None
        answer = estimate(row.spec)
        sizes = (
            answer.peak_allocated_bytes, answer.allocator_required_bytes,
            answer.peak_reserved_bytes, answer.device_required_bytes,
            answer.peak_reserved_bytes + answer.non_torch_bytes,
        )  # fmt: skip
        cells = " | ".join(f"{size / GIB:.2f}" for size in sizes)
        lines.append(
            f"| {row.model} | {row.run} | {_METERS[row.figure]} | {row.published} | {cells} "
            f"| {difference(row, answer):+.1%} | {row.unsaid} | {_link(row.source)} |"
        )
    return "\n".join(lines)


def difference(row: Published, answer: Estimate) -> float:
    """Predicted over published, less one. nvidia-smi shows what torch reserved while the card had
    room; where it had not, anything from the requirement to the card's size."""
    published = round(float(row.published) * GIB)
    outside = answer.non_torch_bytes
    used = answer.peak_reserved_bytes + outside
    if row.figure == "device_used_bytes" and used > answer.device_total_bytes:
        low, high = answer.device_required_bytes, answer.device_total_bytes
        return min(high / published - 1, 0.0) if published > low else low / published - 1
    predicted = {
        "peak_allocated_bytes": answer.peak_allocated_bytes,
        "peak_reserved_bytes": answer.peak_reserved_bytes,
        "device_used_bytes": used,
        "unsaid": answer.device_required_bytes,
    }[row.figure]
    return predicted / published - 1


def _unanswered(rows: Sequence[Published]) -> str:
    lines = [
        "| model | run | figures | published | why | left unsaid | source |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| {row.model} | {row.run} | {row.rows} | {row.published} | {row.not_predicted} "
        f"| {row.unsaid} | {_link(row.source)} |"
        for row in rows
    ]
    return "\n".join(lines)


def _link(source: str) -> str:
    parts = source.removeprefix("https://github.com/").split("/")
    return f"[{'/'.join(parts[:2])}]({source})"
