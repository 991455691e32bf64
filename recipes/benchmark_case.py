"""One case of the benchmark, in a process of its own: build, warm up, time, then tighten the cap.

Reads a case as JSON on standard input, prints its row as the last line of standard output.
"""

from __future__ import annotations

import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import TrainerCallback

from planner.spec import RunSpec, spec_from_mapping
from recipes.benchmark_evaluation import evaluation_row, profiled
from recipes.build import Built, build
from recipes.console import note, out
from recipes.lean import LeanOptions, LeanStep
from recipes.stock import stock_trainer
from recipes.synthetic import RandomSamples, stack


@dataclass(frozen=True, slots=True)
class Case:
    """What to run. spec: fields of a run spec; options: of LeanOptions; caps: how many levels the
    allocator's cap is lowered through, from peak reserved to just above peak allocated."""

    name: str
    spec: dict[str, Any]
    options: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] | None = None
    warm_steps: int = 3
    timed_steps: int = 5
    caps: int = 0
    profile: bool = False


class _Meter:
    """Called at each step's end: times the steps after the warm ones, then lowers the cap."""

    def __init__(self, case: Case, device: torch.device) -> None:
        self._case, self._on_cuda = case, device.type == "cuda"
        self.ends: list[float] = []
        self.peak_allocated_bytes = self.peak_reserved_bytes = 0
        self.cap_passed_bytes: int | None = None
        self._caps: list[int] = []
        self._in_probe = False

    @property
    def steps(self) -> int:
        return self._case.warm_steps + self._case.timed_steps + 2 * self._case.caps

    def end(self) -> None:
        if self._on_cuda:
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())
        done = len(self.ends) - self._case.warm_steps - self._case.timed_steps
        if done == 0:
            self._read_peaks()
        if self._on_cuda and self._case.caps and done >= 0 and done % 2 == 0:
            self._lower(done // 2)

    def seconds(self) -> list[float]:
        first = self._case.warm_steps - 1
        last = self._case.warm_steps + self._case.timed_steps
        ends = self.ends[first:last]
        return [b - a for a, b in itertools.pairwise(ends)]

    def _read_peaks(self) -> None:
        if self._on_cuda:
            self.peak_allocated_bytes = torch.cuda.max_memory_allocated()
            self.peak_reserved_bytes = torch.cuda.max_memory_reserved()

    def _lower(self, level: int) -> None:
        """The cap of `level` 0 is peak reserved; two steps that end under it have passed it."""
        low, high = self.peak_allocated_bytes, self.peak_reserved_bytes
        if level:
            self.cap_passed_bytes = self._caps[-1]
        if level == self._case.caps:
            return
        cap = high - (high - low) * (level + 1) // (self._case.caps + 1)
        self._caps.append(cap)
        torch.cuda.empty_cache()
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(cap / total)

    @property
    def cap_failed_bytes(self) -> int | None:
        untried = not self._caps or self.cap_passed_bytes == self._caps[-1]
        return None if untried else self._caps[-1]


def run(case: Case) -> dict[str, Any]:
    """The case's row: seconds, bytes, rates. Out of memory before the end of timing is an error."""
    spec = spec_from_mapping(case.spec)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    began = time.perf_counter()
    built = build(spec, config=case.config, device=device)
    if device.type == "cuda":
        torch.cuda.synchronize()
    build_s = time.perf_counter() - began
    resident = torch.cuda.memory_allocated() if device.type == "cuda" else 0
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    meter = _Meter(case, device)
    runner = _lean if spec.stack == "lean" else _stock
    began = time.perf_counter()
    try:
        losses = runner(built, spec, case, meter)
    except torch.OutOfMemoryError:
        if meter.peak_allocated_bytes == 0:
            return {"name": case.name, "stack": spec.stack, "outcome": "out of memory"}
        losses = []
    return _row(case, built, meter, build_s, resident, losses, began)


def matrix_rate_flops(size: int = 8192) -> float:
    """FLOP/s of a bf16 matrix product (size cubed) on random data: the card's practical ceiling."""
    a = torch.randn(size, size, device="cuda", dtype=torch.bfloat16)
    b = torch.randn(size, size, device="cuda", dtype=torch.bfloat16)
    for _ in range(5):
        a @ b
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(20):
        a @ b
    torch.cuda.synchronize()
    return 20 * 2 * size**3 / (time.perf_counter() - began)


def useful_flops(built: Built, tokens: int) -> float:
    """2 a parameter and token forward, 2 more for each parameter that a gradient passes through
    (recomputation not counted): embeddings count too, as in the usual 4 for a whole LoRA model."""
    parameters = _base_parameters(built)
    if any(p.requires_grad for p in built.base.model.parameters()):
        return 4.0 * parameters * tokens
    return (2.0 * parameters + 2.0 * built.base.get_output_embeddings().weight.numel()) * tokens


def _base_parameters(built: Built) -> int:
    total = 0
    for name, parameter in built.base.named_parameters():
        if "lora_" not in name:
            shape = getattr(getattr(parameter, "quant_state", None), "shape", parameter.shape)
            total += shape.numel()
    return total


def _lean(built: Built, spec: RunSpec, case: Case, meter: _Meter) -> list[float]:
    step = LeanStep(built, spec, total_steps=meter.steps, options=LeanOptions(**case.options))
    samples = RandomSamples(spec, built.config, spec.micro_batch_size * 4)
    batches = [
        stack([samples[i] for i in range(spec.micro_batch_size)])
        for _ in range(spec.gradient_accumulation_steps)
    ]
    losses = []
    for _ in range(meter.steps):
        losses.append(step.step(batches))
        meter.end()
    if case.profile:
        note(profiled(lambda: step.step(batches)))
    return [loss.item() for loss in losses]


def _stock(built: Built, spec: RunSpec, case: Case, meter: _Meter) -> list[float]:
    count = spec.micro_batch_size * spec.gradient_accumulation_steps * (meter.steps + 1)
    samples = RandomSamples(spec, built.config, count)
    with tempfile.TemporaryDirectory() as folder:
        trainer = stock_trainer(
            built, spec, samples, output_dir=folder, collate=stack,
            callbacks=[_StepEnd(meter.end)], max_steps=meter.steps,
        )  # fmt: skip
        trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


class _StepEnd(TrainerCallback):
    def __init__(self, end: Callable[[], None]) -> None:
        self._end = end

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self._end()


def _row(
    case: Case, built: Built, meter: _Meter, build_s: float, resident: int, losses: list[float],
    began: float,
) -> dict[str, Any]:  # fmt: skip
    spec = built.spec
    tokens = spec.micro_batch_size * spec.sequence_length * spec.gradient_accumulation_steps
    step_s = statistics.median(meter.seconds())
    trained = [p for p in built.model.parameters() if p.requires_grad]
    return {
        "name": case.name, "stack": spec.stack, "spec": case.spec, "options": case.options,
        "tokens_per_step": tokens, "step_s": step_s, "step_s_all": meter.seconds(),
        "tokens_per_s": tokens / step_s, "build_s": build_s,
        "first_step_s": meter.ends[0] - began,
        "resident_bytes": resident,
        "peak_allocated_bytes": meter.peak_allocated_bytes,
        "peak_reserved_bytes": meter.peak_reserved_bytes,
        "cap_passed_bytes": meter.cap_passed_bytes, "cap_failed_bytes": meter.cap_failed_bytes,
        "useful_flops_per_s": useful_flops(built, tokens) / step_s,
        "floor_bytes": resident + sum(p.numel() * 12 for p in trained),
        "first_losses": losses[:3],
    }  # fmt: skip


def main() -> None:
    """Run the case on standard input."""
    values = json.load(sys.stdin)
    if "evaluation" in values["name"]:
        out(json.dumps(evaluation_row(values)))
        return
    if values.get("name") == "matrix rate":
        row = {"name": "matrix rate", "flops_per_s": matrix_rate_flops(),
               "device": torch.cuda.get_device_name(0), "torch": torch.__version__}  # fmt: skip
    elif values.get("name") == "kernel check":
        from recipes.kernel_check import kernel_errors

        errors = kernel_errors(torch.device("cuda"), torch.bfloat16)
        row = {"name": "kernel check", "kernel_error": max(errors.values()), "errors": errors}
    else:
        row = run(Case(**values))
    out(json.dumps(row))


if __name__ == "__main__":
    main()
