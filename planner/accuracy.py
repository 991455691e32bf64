"""The planner's report of its own errors, from residuals: by quantity and by kind, in and out of
sample, and at measured boundaries."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from planner.learn import spread_of
from planner.models.registry import load_model
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


def report_markdown(rows: Sequence[Residual], refused: Sequence[tuple[Measured, str]]) -> str:
    """The report as Markdown, with the command that remakes it."""
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
    ]
    for title, kind in _KINDS.items():
        parts.append(f"## By {title}")
        parts.append(_by(rows, kind))
    parts += ["## Worst rows", _worst(rows)]
    if refused:
        parts += ["## Not predicted", "\n".join(f"- {m.spec.model}: {why}" for m, why in refused)]
    return "\n\n".join(parts) + "\n"


def with_accuracy(text: str, rows: Sequence[Residual]) -> str:
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
        "By family, quantization and kind, with the worst rows: "
        "[results/tables/accuracy.md](results/tables/accuracy.md).",
        END,
    ]
    return before + "\n\n".join(section) + after


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
    widths = []
    for row in bracketed:
        low, high = row.predicted.allocator_required_interval_bytes
        false_fits += high <= (row.measured.failed_cap_bytes or 0)
        false_refusals += low > (row.measured.passed_cap_bytes or 0)
        widths.append((high - low) / row.predicted.allocator_required_bytes)
    if not bracketed:
        return "No bisected record."
    return (
        f'{len(bracketed)} bisected records: {false_fits} would be told "fits" at the cap that '
        f'failed, {false_refusals} "does not fit" at the cap that passed. Intervals are '
        f"{max(widths):.1%} of the requirement wide at most."
    )


def _by(rows: Sequence[Residual], kind: Callable[[Residual], str]) -> str:
    groups: dict[str, list[Residual]] = {}
    for row in rows:
        groups.setdefault(kind(row), []).append(row)
    lines = [
        "| | records | peak allocated: median, worst | required: median, worst | step: median |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name in sorted(groups):
        members = groups[name]
        peak = spread_of(row.peak_allocated for row in members)
        step = spread_of(row.step for row in members)
        brackets = [row.required for row in members if row.required is not None]
        required = "-" if not brackets else "{:.2%}, {:.2%}".format(*spread_of(brackets)[:2])
        lines.append(
            f"| {name} | {len(members)} | {peak[0]:.2%}, {peak[1]:.2%} | {required} "
            f"| {step[0]:.0%} |"
        )
    return "\n".join(lines)


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


_KINDS: dict[str, Callable[[Residual], str]] = {
    "family": lambda row: load_model(row.measured.spec.model).model_type,
    "quantization": lambda row: row.measured.spec.quantization,
    "stack": lambda row: row.measured.spec.stack,
    "checkpointing": lambda row: (
        "checkpointed" if row.measured.spec.gradient_checkpointing else "plain"
    ),
}
