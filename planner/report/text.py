"""`vramwise fit` as text: the verdict first, then what it rests on. Computes nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from planner.answer import Estimate
from planner.cost import run_cost
from planner.models.adapters import adapter_words
from planner.report.groups import groups
from planner.report.terminal import Line, bar
from planner.units import GIB, format_gib, format_seconds

if TYPE_CHECKING:
    from planner.levers import Lever
    from planner.solver import Largest

_STYLE = {"fits": "good", "tight": "warn", "does_not_fit": "bad"}
WORD = {"fits": "fits", "tight": "tight", "does_not_fit": "does not fit"}


def fit_lines(
    answer: Estimate, levers: Sequence[Lever] = (), price_per_hour: float | None = None
) -> list[Line]:
    """The whole answer, line by line."""
    return [
        Line(verdict_sentence(answer), _STYLE[answer.verdict]),
        Line(),
        *_setting_lines(answer),
        *memory_lines(answer),
        *_moment_lines(answer),
        *_time_lines(answer, price_per_hour),
        *note_lines(answer),
        *lever_lines(answer, levers),
    ]


def verdict_sentence(answer: Estimate) -> str:
    """The first line: understood without the rest."""
    low, high = answer.device_required_interval_bytes
    total, needs = (
        format_gib(answer.device_total_bytes, 1),
        format_gib(answer.device_required_bytes, 1),
    )
    if answer.verdict != answer.device_verdict:
        return _host_sentence(answer)
    if answer.verdict == "fits":
        return (f"Yes, it fits: needs about {_gib(answer.device_required_bytes)} of {total} on the "
                f"{answer.device}, {format_gib(answer.headroom_bytes, 1)} to spare.")  # fmt: skip
    if answer.verdict == "tight":
        return (f"Tight: needs about {_gib(answer.device_required_bytes)} of {total} on the "
                f"{answer.device}, between {_gib(low)} and {format_gib(high, 1)}: it may run out "
                "of memory.")  # fmt: skip
    return (f"No, it does not fit: needs about {needs} (at least {format_gib(low, 1)}), and the "
            f"{answer.device} has {total}.")  # fmt: skip


def _host_sentence(answer: Estimate) -> str:
    """The first line where the machine's own memory decides."""
    needs, has = format_gib(answer.host_bytes, 1), format_gib(answer.host_total_bytes or 0, 1)
    if answer.verdict == "tight":
        return (f"Tight: the {answer.device} has room, but the machine's own memory may run out: "
                f"needs between {_gib(answer.host_low_bytes)} and {needs} of {has}.")  # fmt: skip
    room = "has room" if answer.device_verdict == "fits" else "may have room"
    least = format_gib(answer.host_low_bytes, 1)
    return (f"No, it does not fit: the {answer.device} {room}, but the machine's own memory does "
            f"not: needs at least {least}, and has {has}.")  # fmt: skip


def memory_lines(answer: Estimate) -> list[Line]:
    """A bar a group of terms, down to what the card must have."""
    peak, required = answer.peak_allocated_bytes, answer.device_required_bytes
    lines = [Line(f"What fills the memory at the peak ({answer.peak_instant})", "head")]
    rows = [(group.name, group.bytes) for group in groups(answer.terms)]
    beyond = answer.allocator_required_bytes - peak
    rows.append(("allocator: rounding, fragments, other instants", beyond))
    rows.append(("outside torch: CUDA context, kernels", answer.non_torch_bytes))
    for name, size in rows:
        lines.append(Line(_row(name, size, bar(size / required))))
    lines.append(Line(_row("needed in all", required, "")))
    low, high = answer.device_required_interval_bytes
    lines.append(Line(_row("of the card's", answer.device_total_bytes, "")))
    lines.append(
        Line(f"  between {_gib(low, 2)} and {format_gib(high)} ({answer.basis}); headroom "
             f"{format_gib(answer.headroom_bytes)}", "dim")
    )  # fmt: skip
    return [*lines, Line()]


def lever_lines(answer: Estimate, levers: Sequence[Lever]) -> list[Line]:
    """The cheapest changes, one a row."""
    if not levers:
        return []
    title = {
        "fits": "Cheapest changes for more room or speed",
        "tight": "Cheapest changes that make room",
        "does_not_fit": "Cheapest changes towards fitting",
    }
    lines = [Line(title[answer.verdict], "head")]
    for lever in levers:
        saved = f"{-lever.saved_bytes / GIB:+.2f} GiB"
        pace = f"{lever.slower:+.0%}" if abs(lever.slower) >= 0.005 else "same"
        flag = f"  ({lever.effect})" if lever.effect else ""
        lines.append(
            Line(f"  {lever.flags:<54} {saved:>10}  time {pace:>6}  "
                 f"{WORD[lever.verdict]}{flag}")
        )  # fmt: skip
    return lines


def largest_lines(found: Largest) -> list[Line]:
    """`fit --max`: the value, and the answers on both sides of the border."""
    if found.value is None or found.answer is None:
        return [
            Line(f"No {found.field} fits: even {found.smallest} does not.", "bad"),
            Line(),
            Line(verdict_sentence(found.beyond) if found.beyond else ""),
        ]
    limit = f" ({found.limit})" if found.limit else ""
    lines = [
        Line(f"The largest {found.field} that fits is {found.value}{limit}.", "good"),
        Line(),
        Line(f"  {found.field} = {found.value}: {verdict_sentence(found.answer)}"),
    ]
    if found.beyond is not None and found.next_value is not None:
        text = verdict_sentence(found.beyond)
        lines.append(Line(f"  {found.field} = {found.next_value}: {text}"))
    pace = f"{format_seconds(found.answer.step_seconds)} a step"
    return [*lines, Line(f"  {pace}, {found.answer.tokens_per_second:,.0f} tokens/s")]


def settings_sentence(answer: Estimate) -> str:
    """What was asked, in one line."""
    spec = answer.spec
    weights = spec.quantization if spec.quantization != "none" else spec.weights_dtype
    adapter = adapter_words(spec)
    images = f", {spec.images_per_sample} image(s)" if spec.images_per_sample else ""
    batch = f"{spec.micro_batch_size} x {spec.sequence_length} tokens{images}"
    accumulated = spec.gradient_accumulation_steps
    batch += f" x {accumulated} accumulated" if accumulated > 1 else ""
    checkpointing = "on" if spec.gradient_checkpointing else "off"
    return (f"{answer.model}, {weights}, {adapter}; {batch}; checkpointing {checkpointing}; "
            f"{spec.optimizer}; {spec.precision}; {spec.stack} stack")  # fmt: skip


def _setting_lines(answer: Estimate) -> list[Line]:
    counts = answer.parameters
    share = counts.trainable / counts.total
    return [
        Line(settings_sentence(answer)),
        Line(f"{counts.total:,} parameters, {counts.trainable:,} trained ({share:.2%})", "dim"),
        Line(),
    ]


def _moment_lines(answer: Estimate) -> list[Line]:
    moments = ", ".join(f"{name} {_gib(size, 2)}" for name, size in answer.instants.items())
    loading = f"loading {_gib(answer.load_peak_bytes, 2)}"
    if answer.eval_peak_bytes is not None:
        loading += f", evaluation {_gib(answer.eval_peak_bytes, 2)}"
    lines = [Line("Through the run (allocated, GiB)", "head"), Line(f"  {loading}, {moments}")]
    lines.append(Line(f"  {_host_line(answer)}"))
    if answer.paged_bytes:
        paged = format_gib(answer.paged_bytes)
        lines.append(Line(f"  and {paged} of optimizer states in paged (managed) memory"))
    return [*lines, Line()]


def _host_line(answer: Estimate) -> str:
    largest = max(answer.host_terms, key=lambda term: term.bytes)
    of = "; --host-memory has it judged"
    if answer.host_total_bytes is not None:
        of = f", of {format_gib(answer.host_total_bytes)}"
    return (f"host memory: up to {format_gib(answer.host_bytes)}, most of it the {largest.name}"
            f"{of}")  # fmt: skip


def _time_lines(answer: Estimate, price_per_hour: float | None) -> list[Line]:
    low, high = answer.step_seconds_interval
    time = answer.time
    parts = {"arithmetic": time.arithmetic_s, "memory traffic": time.bytes_s,
             "kernel launches": time.launches_s}  # fmt: skip
    gpu_bound = time.launches_s < time.arithmetic_s + time.bytes_s
    bound = max(("arithmetic", "memory traffic"), key=lambda name: parts[name])
    bound = bound if gpu_bound else "kernel launches"
    lines = [
        Line("Time", "head"),
        Line(f"  {format_seconds(answer.step_seconds)} an optimizer step "
             f"({format_seconds(low)} to {format_seconds(high)}), "
             f"{answer.tokens_per_second:,.0f} tokens/s; bound by {bound}"),
    ]  # fmt: skip
    cost = run_cost(answer, price_per_hour)
    if cost is not None:
        money = "" if cost["cost"] is None else f", costs {cost['cost']:,.2f}"
        lines.append(
            Line(f"  {cost['steps']:,} steps take {format_seconds(cost['total_seconds'])}{money}; "
                 f"{cost['checkpoints']} checkpoint(s) take "
                 f"{format_gib(cost['checkpoints_bytes'])} of disk")
        )  # fmt: skip
    return [*lines, Line()]


def note_lines(answer: Estimate) -> list[Line]:
    """What to know beside the figures."""
    lines = [Line(f"note: {note}", "dim") for note in answer.notes]
    return [*lines, Line()] if lines else []


def _row(name: str, size: int, drawn: str) -> str:
    return f"  {name:<48}{format_gib(size):>10}  {drawn}".rstrip()


def _gib(size: float, digits: int = 1) -> str:
    return f"{size / GIB:.{digits}f}"
