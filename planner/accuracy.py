"""The planner's report of its own errors, from residuals: by quantity and by kind, in and out of
sample, and at measured boundaries."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from planner.accuracy_driver import driver_cells, driver_section
from planner.learn import spread_of
from planner.meters import Meters
from planner.models.registry import load_model
from planner.other_tools import ToolRow, families_table, refusals, tools_table
from planner.residuals import Measured, Residual

_LONG_STEP_TOKENS = 4096
COMMAND = (
    "vramwise calibrate results/records --report results/tables/accuracy.md --readme README.md"
)
BEGIN, END = "<!-- accuracy: begin", "<!-- accuracy: end -->"

Getter = Callable[[Residual], float | None]
QUANTITIES: dict[str, Getter] = {
    "resident": lambda row: row.resident,
    "peak allocated": lambda row: row.peak_allocated,
    "allocator required (distance to the measured bracket)": lambda row: row.required,
    f"step seconds, {_LONG_STEP_TOKENS:,} tokens and more": lambda row: (
        row.step if _tokens(row.measured) >= _LONG_STEP_TOKENS else None
    ),
    "step seconds, fewer tokens": lambda row: (
        row.step if _tokens(row.measured) < _LONG_STEP_TOKENS else None
    ),
}


def error_lines(rows: Sequence[Residual]) -> list[str]:
    """One line a quantity: median, worst, bias."""
    lines = []
    for name, get in QUANTITIES.items():
        errors = [value for row in rows if (value := get(row)) is not None]
        if errors:
            middle, worst, bias = spread_of(errors)
            lines.append(
                f"{name}: median {middle:.2%}, worst {worst:.2%}, bias {bias:+.2%} ({len(errors)})"
            )
    return lines


def report_markdown(
    rows: Sequence[Residual],
    refused: Sequence[tuple[Measured, str]],
    meters: Mapping[str, Meters] | None = None,
    tools: Sequence[ToolRow] = (),
) -> str:
    """The report as Markdown, with the command that remakes it. meters: what else the records
    measured, by key; tools: other tools' answers."""
    measured = meters or {}
    parts = [
        "# Predicted against measured",
        f"Made by `{COMMAND}`. Errors are predicted over measured less one. A third of the records "
        "is held out by the hash of its key: no speed was fitted to it. Bytes are not "
        "fitted to any record; the requirement's bands are the residuals of all bisected ones.",
        "## Held out",
        table(row for row in rows if row.measured.held_out),
        "## All records",
        table(rows),
        "## Boundaries",
        boundaries(rows),
        "## The whole card, evaluation, the host",
        driver_section(rows, measured),
    ]
    for title, kind in _KINDS.items():
        parts.append(f"## By {title}")
        parts.append(_by(rows, kind, measured))
        if title == "quantization" and any(
            row.measured.spec.quantization == "int8" for row in rows
        ):
            parts.append(_INT8)
        if title == "process":
            parts.append(_USED_PROCESS)
    if tools:
        parts += ["## Beside other tools, on the same rows", TOOLS_NOTE, tools_table(tools, rows)]
        parts += ["Median by family, with how many were answered:", families_table(tools, rows)]
        parts += ["What they refuse, or have no option for:", refusals(tools, rows)]
    parts += ["## Worst rows", _worst(rows)]
    if refused:
        parts += ["## Not predicted", "\n".join(f"- {m.spec.model}: {why}" for m, why in refused)]
    return "\n\n".join(parts) + "\n"


def with_accuracy(text: str, rows: Sequence[Residual], tools: Sequence[ToolRow] = ()) -> str:
    """A README with its accuracy section remade, between its two marks."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    held_out = [row for row in rows if row.measured.held_out]
    families = ", ".join(sorted({load_model(r.measured.spec.model).model_type for r in rows}))
    section = [
        f"{BEGIN} (made by `{COMMAND}`) -->",
        f"On {len(held_out)} records of an H200 that no speed was fitted to (a third of "
        f"{len(rows)}, chosen by hash; families {families}; torch 2.11, transformers 5.17). No "
        "byte is fitted to "
        "any record: allocated bytes follow from the modelling code, reserved ones from the "
        "allocator's rules.",
        table(held_out),
        boundaries(rows),
        *_tools_short(tools, rows),
        "By family, quantization and kind, with the worst rows: "
        "[results/tables/accuracy.md](results/tables/accuracy.md); against figures that others "
        "published: [results/tables/published.md](results/tables/published.md).",
        END,
    ]
    return before + "\n\n".join(section) + after


def _tools_short(tools: Sequence[ToolRow], rows: Sequence[Residual]) -> list[str]:
    """The README's lines about other tools: those that answer for the whole card."""
    asked = [row for row in tools if row.quantity == "device"]
    if not asked:
        return []
    return [
        "Other tools on the same records, each on the rows that it answers (weights-only figures, "
        "tensors alone and refusals are in the full report):",
        tools_table(asked, rows),
    ]


def table(rows: Iterable[Residual]) -> str:
    """Median, worst and bias of each quantity."""
    listed = list(rows)
    lines = ["| quantity | records | median | worst | bias |", "| --- | --- | --- | --- | --- |"]
    for name, get in QUANTITIES.items():
        errors = [value for row in listed if (value := get(row)) is not None]
        if errors:
            middle, worst, bias = spread_of(errors)
            lines.append(f"| {name} | {len(errors)} | {middle:.2%} | {worst:.2%} | {bias:+.2%} |")
    return "\n".join(lines)


def boundaries(rows: Sequence[Residual]) -> str:
    """False verdicts of the allocator's interval at the caps that failed and passed."""
    bracketed = [row for row in rows if row.required is not None]
    false_fits = false_refusals = 0
    widest = 0.0
    for row in bracketed:
        low, high = row.predicted.allocator_required_interval_bytes
        false_fits += high <= (row.measured.failed_cap_bytes or 0)
        false_refusals += low > (row.measured.passed_cap_bytes or 0)
        widest = max(widest, (high - low) / row.predicted.allocator_required_bytes)
    if not bracketed:
        return "No bisected record."
    return (
        f'{len(bracketed)} bisected records: {false_fits} would be told "fits" at the cap that '
        f'failed, {false_refusals} "does not fit" at the cap that passed. Intervals are '
        f"{widest:.1%} of the requirement wide at most."
    )


def _by(rows: Sequence[Residual], kind: Kind, meters: Mapping[str, Meters]) -> str:
    groups: dict[str, list[Residual]] = {}
    for row in rows:
        groups.setdefault(kind(row, meters), []).append(row)
    lines = [
        "| | records | held out | peak allocated: median, worst, bias | required: median, worst, "
        "bias | outside torch: median, worst | whole card: median, worst, bias | step: median |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name in sorted(groups):
        members = groups[name]
        peak = _cells(row.peak_allocated for row in members)
        required = _cells(row.required for row in members if row.required is not None)
        outside, card = driver_cells(members, meters)
        step = spread_of(row.step for row in members)[0]
        lines.append(
            f"| {name} | {len(members)} | {sum(row.measured.held_out for row in members)} | {peak} "
            f"| {required} | {outside} | {card} | {step:.0%} |"
        )
    return "\n".join(lines)


def _cells(errors: Iterable[float]) -> str:
    listed = list(errors)
    return "{:.2%}, {:.2%}, {:+.2%}".format(*spread_of(listed)) if listed else "-"


def _worst(rows: Sequence[Residual]) -> str:
    ranked = sorted(rows, key=lambda row: -abs(row.required or row.peak_allocated))[:8]
    lines = ["| configuration | peak allocated | required | step |", "| --- | --- | --- | --- |"]
    for row in ranked:
        required = "-" if row.required is None else f"{row.required:+.2%}"
        lines.append(
            f"| {describe(row.measured)} | {row.peak_allocated:+.2%} | {required} "
            f"| {row.step:+.0%} |"
        )
    return "\n".join(lines)


def describe(measured: Measured) -> str:
    """A configuration in a line."""
    spec = measured.spec
    words = [
        spec.model.rpartition("/")[2], spec.stack, spec.method, spec.quantization,
        f"r={spec.lora.rank}" if spec.method == "lora" else "",
        f"{spec.micro_batch_size} x {spec.sequence_length}",
        f"{spec.images_per_sample} images" if spec.images_per_sample else "",
        "checkpointed" if spec.gradient_checkpointing else "", spec.optimizer,
    ]  # fmt: skip
    return ", ".join(word for word in words if word)


def _tokens(measured: Measured) -> int:
    spec = measured.spec
    return spec.micro_batch_size * spec.sequence_length * spec.gradient_accumulation_steps


Kind = Callable[[Residual, Mapping[str, Meters]], str]
_KINDS: dict[str, Kind] = {
    "family": lambda row, _: load_model(row.measured.spec.model).model_type,
    "quantization": lambda row, _: row.measured.spec.quantization,
    "stack": lambda row, _: row.measured.spec.stack,
    "checkpointing": lambda row, _: (
        "checkpointed" if row.measured.spec.gradient_checkpointing else "plain"
    ),
    "method": lambda row, _: row.measured.spec.method,
    "process": lambda row, _: "fresh" if row.measured.fresh else "after other shapes",
}

_USED_PROCESS = (
    "A load may serve several shapes. What is allocated is that of a fresh process; reserved "
    "bytes and the smallest cap depend on where earlier shapes left segments, since the allocator "
    "takes the lowest of equal holes. Predictions are of a fresh process; where a bracket lay far "
    "from its prediction, fresh processes searched it again (results/capacities)."
)

_INT8 = (
    "8 bits: bitsandbytes' `MatMul8bitLt` keeps, beside its int8 copy, every input column that "
    "holds a value beyond its threshold of 6 (`A[:, outlier columns]`, in 16 bits). The records' "
    "weights were drawn at random, with which nearly every input of `down_proj` has one; how many "
    "is predicted from their distribution (planner/memory/outliers.py), and it is what a spec's "
    '`int8_outliers = "many"`, the default, counts. In trained models such columns are few (about '
    '0.1% of the features, https://arxiv.org/abs/2208.07339): `"few"` leaves them out.'
)
TOOLS_NOTE = (
    "Made by `python -m probes.others results/records --out results/tables/other-tools.csv`, which "
    "asks each tool itself, offline, from the same configs, for every record of the stock stack. A "
    "figure for the whole card is held against the measured requirement and what lies outside "
    "torch, 0 inside the measured bracket (records that evaluate are left out of it: no cap was "
    "bisected over evaluation); a tool that raises is counted as refusing. Tools that price every "
    "parameter as trained are asked about full fine-tunes alone. Not asked: DeepSpeed's estimators "
    "(model states alone, and no install without a build), LLaMA-Factory (a table in its README, "
    "no function), gpu_poor (a web page), xMem (runs the training on a CPU)."
)
