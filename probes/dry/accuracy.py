"""`python -m probes.dry.accuracy`: every stored record of a card against its trace.

Writes a row a record (CSV) and a summary by family (Markdown). Residues are relative: traced less
measured, over measured; of the requirement, the distance to the bracket that was measured.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from statistics import mean, median

from planner.devices import find_device
from planner.errors import VramwiseError
from planner.memory.allocator import ROUND_LARGE_BYTES
from planner.memory.replay import replay
from planner.models.registry import load_model
from planner.residuals import fresh_capacities
from probes.dry.events import Trace, stream
from probes.dry.exact import steps_required_bytes
from probes.dry.target import target_of
from probes.dry.trace import trace
from probes.records import Capacity, Record
from probes.store import latest, read

QUANTITIES = ("resident", "load_peak", "peak_allocated", "evaluation", "required")
_PHASES = {"forward": ("forward",), "backward": ("backward", "recompute"),
           "clipping": ("clip",), "optimizer": ("optimizer",)}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Row:
    """One record: residues as fractions (None: not measured, or not asked for), sizes in bytes."""

    key: str
    campaign: str
    family: str
    stack: str
    setting: str
    resident: float | None
    load_peak: float | None
    peak_allocated: float | None
    evaluation: float | None
    required: float | None
    peak_allocated_bytes: int
    traced_peak_allocated_bytes: int
    failed_cap_bytes: int | None
    passed_cap_bytes: int | None
    traced_required_bytes: int | None
    seconds: float
    unknown: str
    phases: str


def compare(record: Record) -> Row:
    """Trace the record's spec and hold every meter against it. Raises VramwiseError."""
    meters = record.meters
    assert meters is not None
    assert record.environment is not None
    device = find_device(record.environment.device)
    traced = trace(record.spec, target=target_of(device))
    peak = traced.replayed_for(record.options.steps).peak_allocated_bytes
    required = steps_required_bytes(traced, ROUND_LARGE_BYTES) if meters.capacity else 0
    load, evaluation = meters.phases.get("load"), meters.phases.get("evaluation")
    return Row(
        record.key, record.campaign, load_model(record.spec.model).model_type, record.spec.stack,
        _setting(record),
        _residue(traced.allocated_after_load_bytes, meters.resident_bytes),
        _residue(traced.base_load_peak_bytes, load.peak_allocated_bytes) if load else None,
        _residue(peak, meters.peak_allocated_bytes),
        _residue(traced.eval_peak_bytes, evaluation.peak_allocated_bytes) if evaluation else None,
        _distance(required, meters.capacity, peak) if meters.capacity else None,
        meters.peak_allocated_bytes, peak,
        meters.capacity.failed_cap_bytes if meters.capacity else None,
        meters.capacity.passed_cap_bytes if meters.capacity else None,
        required or None, round(traced.seconds, 1),
        "; ".join(traced.unknown_operations), _by_phase(traced, record),
    )  # fmt: skip


def _with_capacity(record: Record, fresh: Mapping[str, tuple[int | None, int]]) -> Record:
    """The record with the bracket that fresh processes found, where they were asked."""
    if record.key not in fresh or record.meters is None:
        return record
    failed, passed = fresh[record.key]
    capacity = Capacity(failed_cap_bytes=failed, passed_cap_bytes=passed, attempts=(), seconds=0.0)
    meters = record.meters.model_copy(update={"capacity": capacity})
    return record.model_copy(update={"meters": meters})


def _residue(traced: int | None, measured: int) -> float | None:
    return None if traced is None else (traced - measured) / measured


def _distance(required: int, bracket: Capacity, peak: int) -> float:
    """0 inside (failed, passed]; else how far beyond the nearer end, relative to it. Where no
    smaller cap was tried, nothing below the peak can pass."""
    low, high = bracket.failed_cap_bytes or peak, bracket.passed_cap_bytes
    if required > high:
        return (required - high) / high
    return min(0.0, (required - low) / low)


def _setting(record: Record) -> str:
    spec = record.spec
    words = [
        spec.method, spec.quantization, f"{spec.micro_batch_size}x{spec.sequence_length}",
        spec.precision, spec.optimizer, spec.attention,
        f"r={spec.lora.rank} on {_targets(spec.lora.target_modules)}"
        if spec.method == "lora" else "",
        "checkpointed" if spec.gradient_checkpointing else "",
        f"{spec.images_per_sample} images" if spec.images_per_sample else "",
        f"x{spec.gradient_accumulation_steps}" if spec.gradient_accumulation_steps > 1 else "",
        "expandable" if spec.expandable_segments else "",
    ]  # fmt: skip
    return " ".join(word for word in words if word)


def _targets(targets: str | Sequence[str]) -> str:
    return targets if isinstance(targets, str) else "+".join(targets)


def _by_phase(traced: Trace, record: Record) -> str:
    """The peak's residue in each phase of the last step, in MiB: where a cause is to be sought."""
    meters = record.meters
    assert meters is not None
    last = {event.phase for event in traced.events if event.step == traced.events[-1].step}
    before = stream(traced.load)
    told = []
    for name, phases in _PHASES.items():
        if name not in meters.phases or not set(phases) & last:
            continue
        peak = _phase_peak(before, traced, phases)
        measured = meters.phases[name].peak_allocated_bytes
        if name == "forward" and "loss" in meters.phases:
            measured = max(measured, meters.phases["loss"].peak_allocated_bytes)
        told.append(f"{name} {(peak - measured) / 2**20:+.1f}")
    return ", ".join(told)


def _phase_peak(before: list[tuple[int, int]], traced: Trace, phases: tuple[str, ...]) -> int:
    last = traced.events[-1].step
    wanted = [i for i, e in enumerate(traced.events) if e.step == last and e.phase in phases]
    events = stream(traced.events)
    start, end = wanted[0], wanted[-1] + 1
    whole = [*before, *events[:start], (-2, 0), *events[start:end]]
    return replay(whole, expandable_segments=traced.expandable).peak_allocated_bytes


def summary(rows: Sequence[Row]) -> list[str]:
    """A Markdown table: median and worst of the sizes of residues, and their mean with its sign."""
    lines = [
        "| family | stack | quantity | records | median | worst | bias |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: |",
    ]
    groups = [("all", "all", list(rows))]
    for family, stack in sorted({(row.family, row.stack) for row in rows}):
        chosen = [row for row in rows if (row.family, row.stack) == (family, stack)]
        groups.append((family, stack, chosen))
    for family, stack, chosen in groups:
        for quantity in QUANTITIES:
            found = [value for row in chosen if (value := getattr(row, quantity)) is not None]
            if found:
                sizes = [abs(value) for value in found]
                lines.append(
                    f"| {family} | {stack} | {quantity} | {len(found)} | {median(sizes):.3%} "
                    f"| {max(sizes):.3%} | {mean(found):+.3%} |"
                )
    return lines


def write_band(path: Path, rows: Sequence[Row]) -> None:
    """The band that `planner.traced` puts around a traced requirement: no bracket of the rows lies
    outside it."""
    stacks: dict[str, dict[str, float]] = {}
    bisected = [row for row in rows if row.traced_required_bytes and row.passed_cap_bytes]
    for stack in sorted({row.stack for row in bisected}):
        chosen = [row for row in bisected if row.stack == stack]
        ratios = [
            (row.failed_cap_bytes / row.traced_required_bytes,
             row.passed_cap_bytes / row.traced_required_bytes)
            for row in chosen
            if row.failed_cap_bytes and row.passed_cap_bytes and row.traced_required_bytes
        ]  # fmt: skip
        if not ratios:
            continue
        lows, highs = zip(*ratios, strict=True)
        stacks[stack] = {"low": round(min(*lows, 1.0) - 1, 4),
                         "high": round(max(*highs, 1.0) - 1, 4), "records": len(lows)}  # fmt: skip
    families = sorted({row.family for row in rows})
    text = json.dumps({"model_types": families, "stacks": stacks}, indent=2)
    path.write_text(text + "\n", encoding="utf-8")


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """A row a record, as CSV."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)], lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({
                name: f"{value:+.6f}" if name in QUANTITIES and value is not None else value
                for name, value in asdict(row).items()
            })  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Trace the records below a folder, print the summary, store both."""
    parser = argparse.ArgumentParser("python -m probes.dry.accuracy", description=__doc__)
    parser.add_argument("--records", type=Path, default=Path("results/records"))
    parser.add_argument("--tables", type=Path, help="folder to store the tables in")
    parser.add_argument("--band", type=Path, help="JSON file to store the requirement's band in")
    parser.add_argument("--only", default="", help="records whose setting holds this text")
    given = parser.parse_args(arguments)
    records, faults = read(given.records)
    for fault in faults:
        print(fault, file=sys.stderr)  # noqa: T201
    wanted = [r for r in latest(records) if r.outcome == "ok" and r.meters and r.environment]
    fresh = fresh_capacities(given.records)
    rows = []
    for record in (_with_capacity(record, fresh) for record in wanted):
        name = f"{record.spec.model} {record.spec.stack} {_setting(record)} {record.key}"
        if given.only not in name:
            continue
        try:
            row = compare(record)
        except VramwiseError as error:
            print(f"{name}: {error}", file=sys.stderr)  # noqa: T201
            continue
        rows.append(row)
        residues = " ".join(
            f"{q}={value:+.3%}" for q in QUANTITIES if (value := getattr(row, q)) is not None
        )
        print(f"{name}: {residues} [{row.phases}] {row.unknown}", file=sys.stderr, flush=True)  # noqa: T201
    lines = summary(rows)
    print("\n".join(lines))  # noqa: T201
    if given.tables:
        given.tables.mkdir(parents=True, exist_ok=True)
        write_rows(given.tables / "dry-probe-accuracy.csv", rows)
        title = "<!-- python -m probes.dry.accuracy --tables results/tables -->\n\n"
        text = title + "\n".join(lines) + "\n"
        (given.tables / "dry-probe-accuracy.md").write_text(text, encoding="utf-8")
    if given.band:
        write_band(given.band, rows)
    return 1 if faults else 0


if __name__ == "__main__":
    raise SystemExit(main())
