# ruff: noqa: T201 (a command line)
"""`vramwise records`: list, filter and export what was measured, through pandas."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pandas as pd

from planner.errors import InputError, Problem, nearest_name
from planner.flags import Parser
from planner.units import GIB
from probes.records import EVALUATIONS, Record
from probes.store import latest, read

_DEFAULT_STORE = Path("results/records")
_WRITERS = (".csv", ".parquet", ".md", ".json")
# What a listing shows; bytes become GiB in the listing alone.
_LISTED = (
    "outcome", "model", "stack", "method", "quantization", "lora.rank", "lora.target_modules",
    "micro_batch_size", "sequence_length", "images_per_sample", "gradient_checkpointing",
    "optimizer", "precision", "resident_bytes", "peak_allocated_bytes", "peak_reserved_bytes",
    "required_bytes", "step_s",
)  # fmt: skip


def run(argv: list[str]) -> int:
    """Entry point of `vramwise records`. 0; 1 when lines could not be read (they are told)."""
    arguments = _parser().parse_args(argv)
    if not arguments.store.exists():
        raise InputError(Problem("--store", "no such file or folder", str(arguments.store)))
    records, faults = read(arguments.store)
    for fault in faults:
        print(f"warning: {fault}", file=sys.stderr)
    records = records if arguments.all else latest(records)
    table = filtered(frame(records), arguments.where)
    if arguments.out is None:
        print(listing(table))
    else:
        write(table, arguments.out)
        print(f"{len(table)} records written to {arguments.out}")
    return 1 if faults else 0


def _parser() -> Parser:
    parser = Parser(
        prog="vramwise records", description="List, filter and export measured records."
    )
    parser.add_argument("--store", type=Path, default=_DEFAULT_STORE, help="a .jsonl or a folder")
    parser.add_argument("--where", action="append", default=[], metavar="FIELD=VALUE",
                        help="keep rows whose field is the value (repeatable)")  # fmt: skip
    parser.add_argument("--all", action="store_true", help="earlier records of a probe, too")
    parser.add_argument("--out", type=Path, help=f"a file to write: {', '.join(_WRITERS)}")
    return parser


def frame(records: list[Record]) -> pd.DataFrame:
    """A row a record: spec fields under their own (dotted) names, meters with their units."""
    return pd.DataFrame([row(record) for record in records], columns=None)


def row(record: Record) -> dict[str, Any]:
    """One record, flat. Phases become `<phase>.peak_allocated_bytes` and the like."""
    spec = record.spec.model_dump(mode="json", exclude={"versions", "schedule"})
    lora = spec.pop("lora")
    flat = {
        "key": record.key, "campaign": record.campaign, "time_utc": record.time_utc,
        "outcome": record.outcome, "evidence": record.evidence, **spec,
        **{f"lora.{name}": _joined(value) for name, value in lora.items()},
        **{f"options.{name}": value for name, value in record.options.model_dump().items()},
    }  # fmt: skip
    if record.environment is not None:
        environment = record.environment.model_dump()
        flat.update({f"environment.{name}": value for name, value in environment.items()})
    if record.meters is not None:
        flat.update(_meters(record))
    if record.process is not None:
        flat.update({f"process.{k}": v for k, v in record.process.model_dump().items()})
        flat["process.overhead_s"] = overhead_s(record)
    for name, value in (record.predicted or {}).items():
        flat[f"predicted.{name}"] = _joined(value)
    return flat


def overhead_s(record: Record) -> float | None:
    """Seconds that a probe took beyond its steps, evaluation and bisection (loading apart)."""
    meters, process = record.meters, record.process
    if meters is None or process is None or meters.step_seconds is None:
        return None
    evaluation = meters.phases.get("evaluation")
    each = evaluation.seconds.median_s if evaluation and evaluation.seconds else 0.0
    bisection = meters.capacity.seconds if meters.capacity else 0.0
    steps = meters.step_seconds.median_s * record.options.steps
    return process.total_seconds - steps - EVALUATIONS * each - bisection


def _meters(record: Record) -> dict[str, Any]:
    assert record.meters is not None
    values = record.meters.model_dump(mode="json")
    phases, capacity = values.pop("phases"), values.pop("capacity") or {}
    step, driver = values.pop("step_seconds") or {}, values.pop("driver") or {}
    values.pop("saved_tensors_bytes")
    values.pop("losses")
    flat = {**values, **{f"driver.{k}": v for k, v in driver.items()}}
    flat.update({"step_s": step.get("median_s"), "step_min_s": step.get("min_s"),
                 "step_max_s": step.get("max_s")})  # fmt: skip
    flat["required_bytes"] = capacity.get("passed_cap_bytes")
    flat["required_above_bytes"] = capacity.get("failed_cap_bytes")
    for phase, meters in phases.items():
        seconds = meters.pop("seconds") or {}
        flat.update({f"{phase}.{name}": value for name, value in meters.items()})
        flat[f"{phase}.median_s"] = seconds.get("median_s")
    return flat


def filtered(table: pd.DataFrame, conditions: list[str]) -> pd.DataFrame:
    """Rows that meet every FIELD=VALUE, compared as text. Raises InputError for unknown fields."""
    for condition in conditions:
        field, equals, value = condition.partition("=")
        if not equals or field not in table.columns:
            near = nearest_name(field, table.columns)
            raise InputError(Problem("--where", "is not FIELD=VALUE of a field that the records "
                                     "have", condition, nearest=near))  # fmt: skip
        table = table[[_text(found).lower() == value.lower() for found in table[field]]]
    return table


def listing(table: pd.DataFrame) -> str:
    """The rows in a terminal: few columns, bytes as GiB."""
    if table.empty:
        return "no records"
    shown = table[[name for name in _LISTED if name in table.columns]].copy()
    for name in [name for name in shown.columns if name.endswith("_bytes")]:
        shown[name] = (shown[name] / GIB).round(3)
    shown = shown.rename(columns=lambda name: name.replace("_bytes", "_gib"))
    return str(shown.to_string(index=False, na_rep="-"))


def write(table: pd.DataFrame, path: Path) -> None:
    """Export by the file's suffix. Raises InputError for one that is unknown."""
    suffix = path.suffix.lower()
    if suffix == ".csv":
        table.to_csv(path, index=False)
    elif suffix == ".parquet":
        table.to_parquet(path, index=False)
    elif suffix == ".json":
        table.to_json(path, orient="records", indent=1)
    elif suffix == ".md":
        path.write_text(markdown(table), encoding="utf-8")
    else:
        raise InputError(Problem("--out", "is no format", str(path), ", ".join(_WRITERS)))


def markdown(table: pd.DataFrame) -> str:
    """A GitHub table of the listed columns, bytes as integers."""
    names = [name for name in _LISTED if name in table.columns]
    lines = ["| " + " | ".join(names) + " |", "|" + " --- |" * len(names)]
    for values in table[names].itertuples(index=False):
        lines.append("| " + " | ".join("-" if pd.isna(v) else _text(v) for v in values) + " |")
    return "\n".join(lines) + "\n"


def _joined(value: Any) -> Any:
    """A list as one cell; everything else as it is, so that a column keeps its type."""
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else value


def _text(value: Any) -> str:
    """A cell as read: whole numbers without a fraction."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)
