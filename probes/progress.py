"""What a sweep says while it runs: one line a probe, and the time left."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from planner.spec import Lora, RunSpec
from planner.units import format_gib, format_seconds
from probes.grid import Point
from probes.records import Record

_TOLD_WHERE_UNUSUAL = (
    "precision", "double_quant", "gradient_accumulation_steps", "attention", "max_grad_norm",
    "expandable_segments", "evaluation_batch_size",
)  # fmt: skip


def _usual(spec: RunSpec) -> Lora:
    """The spec's adapter at the default dropout and alpha."""
    return spec.lora.model_copy(update={"dropout": Lora().dropout, "alpha": spec.lora.alpha})


def describe(point: Point) -> str:
    """A probe in a few words."""
    spec = point.spec
    weights = spec.quantization if spec.quantization != "none" else spec.weights_dtype
    targets = spec.lora.target_modules
    names = targets if isinstance(targets, str) else "/".join(targets)
    adapter = "full" if spec.method == "full" else f"r={spec.lora.rank} on {names}"
    shape = f"{spec.micro_batch_size} x {spec.sequence_length}"
    extras = [f"{spec.images_per_sample} images"] if spec.images_per_sample else []
    extras += ["checkpointed"] if spec.gradient_checkpointing else []
    extras += [spec.optimizer] if spec.optimizer != "adamw_torch_fused" else []
    extras += [
        f"{name} {getattr(spec, name)}"
        for name in _TOLD_WHERE_UNUSUAL
        if getattr(spec, name) != RunSpec.model_fields[name].default
    ]
    extras += [f"dropout {spec.lora.dropout}"] if spec.lora != _usual(spec) else []
    return ", ".join([spec.model, spec.stack, weights, adapter, shape, *extras])


class Progress:
    """Counts probes and estimates the time left from those that are done."""

    def __init__(self, total: int, say: Callable[[str], None]) -> None:
        self.total, self.say = total, say
        self.done = self.known = 0
        self._started = time.monotonic()
        self._lock = threading.Lock()

    def already_done(self, count: int) -> None:
        """Probes that were recorded before, or that another sweep has claimed."""
        with self._lock:
            self.known += count

    def begins(self, point: Point, gpu: int | None) -> None:
        """Nothing is said at a probe's start; its end has the numbers."""

    def ends(self, record: Record, budget_left_s: float | None) -> None:
        """Say a record's outcome in one line."""
        with self._lock:
            self.done += 1
            each = (time.monotonic() - self._started) / self.done
            left = (self.total - self.done - self.known) * each
        if budget_left_s is not None:
            left = min(left, max(budget_left_s, 0.0))
        point = Point(record.key, record.spec, record.options)
        count = f"[{self.done + self.known}/{self.total}]"
        text = f"{count} {record.outcome} {describe(point)}: {_numbers(record)}"
        self.say(f"{text}; {format_seconds(left)} left")


def _numbers(record: Record) -> str:
    meters = record.meters
    if meters is None:
        return (record.evidence or "")[:300]
    text = (
        f"{format_gib(meters.resident_bytes, 3)} resident, "
        f"{format_gib(meters.peak_allocated_bytes, 3)} allocated, "
        f"{format_gib(meters.peak_reserved_bytes, 3)} reserved"
    )
    if meters.capacity is not None:
        failed = meters.capacity.failed_cap_bytes
        low = format_gib(failed, 3) if failed else "-"
        text += f", needs ({low}, {format_gib(meters.capacity.passed_cap_bytes, 3)}]"
    if meters.step_seconds is not None:
        text += f", {format_seconds(meters.step_seconds.median_s)} a step"
    if record.process is not None:
        text += f" (took {format_seconds(record.process.total_seconds)})"
    return text
