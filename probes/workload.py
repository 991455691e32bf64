"""The steps that a probe measures: the recipes' own two stacks, driven for a few steps."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.state import AcceleratorState
from transformers import PrinterCallback, TrainerCallback

from planner.spec import RunSpec
from probes.clean import remember, restore, restore_values
from probes.phases import PhaseClock, watching
from probes.records import EVALUATIONS
from probes.samples import Pool, Sample, collate, make_pool
from recipes.build import Built
from recipes.lean import LeanStep
from recipes.phases import Phase
from recipes.stock import stock_trainer

# Nothing is logged, saved or evaluated between the steps that are timed.
_QUIET: dict[str, Any] = {"logging_strategy": "no", "save_strategy": "no", "eval_strategy": "no"}


@dataclass(frozen=True, slots=True)
class Ran:
    """What a run leaves behind: its losses, and optimizer steps asked for but skipped (fp16)."""

    losses: tuple[float, ...]
    optimizer_steps: int
    optimizer_steps_skipped: int


class StockRunner:
    """The reference workload: a new `Trainer` each run, the model put back after each."""

    def __init__(self, built: Built) -> None:
        self.built = built
        self._state = remember(built.model)

    def run(self, clock: PhaseClock, steps: int) -> Ran:
        """Optimizer steps, then the evaluation where the spec has one."""
        spec, config = self.built.spec, self.built.config
        evaluation = evaluation_pool(self.built)
        with tempfile.TemporaryDirectory() as folder, watching(clock, self.built.model):
            trainer = stock_trainer(
                self.built,
                spec,
                make_pool(spec, config, _samples(spec) * steps),
                output_dir=folder,
                evaluation=evaluation,
                collate=collate,
                callbacks=[_StepEnds(clock)],
                **_QUIET,
                max_steps=steps,
            )
            trainer.remove_callback(PrinterCallback)
            result = trainer.train()
            for _ in range(EVALUATIONS if evaluation is not None else 0):
                clock.hold("evaluation")
                trainer.evaluate()
                clock.release()
        return _ran(clock, steps, (float(result.training_loss),))

    def reset(self) -> None:
        """As before the first run; accelerate keeps mixed precision in a process-wide singleton."""
        restore(self._state)
        AcceleratorState._reset_state(reset_partial_state=True)

    def close(self) -> None:
        """The model as it was built."""
        self.reset()


class LeanRunner:
    """The project's own step: made (and compiled) once, its optimizer emptied between runs."""

    def __init__(self, built: Built) -> None:
        self.built = built
        self._state = remember(built.model)
        self._step: LeanStep | None = None
        self._clock: PhaseClock | None = None

    def run(self, clock: PhaseClock, steps: int) -> Ran:
        """Optimizer steps, then the evaluation where the spec has one."""
        self._clock = clock
        if self._step is None:
            self._step = LeanStep(
                self.built, self.built.spec, total_steps=10_000, listener=self._hear
            )
        losses = []
        clock.begin()
        for batches in _batches(self.built, steps):
            losses.append(self._step.step(batches))
            clock.step_end()
        clock.enter(None)
        pool = evaluation_pool(self.built)
        if pool is not None:
            batch = collate(list(iter_pool(pool)))
            for _ in range(EVALUATIONS):
                clock.hold("evaluation")
                self._step.evaluate(batch)
                clock.release()
        return _ran(clock, steps, tuple(float(loss) for loss in losses))

    def _hear(self, phase: Phase, begins: bool) -> None:
        clock = self._clock
        assert clock is not None
        heard: dict[tuple[Phase, bool], str] = {
            ("forward", True): "forward",
            ("loss", True): "loss",
            ("backward", True): "backward",
            ("backward", False): "clipping",
            ("optimizer", True): "optimizer",
            ("optimizer", False): "between",
        }
        if (phase, begins) in heard:
            clock.enter(heard[phase, begins])

    def reset(self) -> None:
        """No optimizer states, no gradients, the adapters' first values."""
        restore_values(self._state)
        if self._step is not None:
            self._step.optimizer.state.clear()
            self._step.step_index = 0

    def close(self) -> None:
        """The model as it was built, and no kernels that the next shape's would build upon."""
        if self._step is not None:
            torch._dynamo.reset()
        self._step = None
        restore(self._state)


Runner = StockRunner | LeanRunner


def runner_for(built: Built) -> Runner:
    """The runner of the spec's stack."""
    return StockRunner(built) if built.spec.stack == "stock" else LeanRunner(built)


def evaluation_pool(built: Built) -> Pool | None:
    """One evaluation batch; None where the spec evaluates nothing."""
    count = built.spec.evaluation_batch_size
    return make_pool(built.spec, built.config, count, seed=1) if count else None


def iter_pool(pool: Pool) -> Iterator[Sample]:
    """Every sample of a pool, once."""
    return (pool[index] for index in range(len(pool)))


def _samples(spec: RunSpec) -> int:
    """Samples of one optimizer step."""
    return spec.micro_batch_size * spec.gradient_accumulation_steps


def _batches(built: Built, steps: int) -> Iterator[list[Sample]]:
    """The micro batches of each optimizer step, pinned as a loader would hand them over."""
    spec = built.spec
    pool = make_pool(spec, built.config, spec.micro_batch_size)
    batch = collate(list(iter_pool(pool)))
    if built.device.type == "cuda":
        batch = {name: value.pin_memory() for name, value in batch.items()}
    return ([batch] * spec.gradient_accumulation_steps for _ in range(steps))


def _ran(clock: PhaseClock, steps: int, losses: tuple[float, ...]) -> Ran:
    return Ran(losses, clock.optimizer_calls, steps - clock.optimizer_calls)


class _StepEnds(TrainerCallback):
    def __init__(self, clock: PhaseClock) -> None:
        self.clock = clock

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.clock.begin()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.clock.step_end()

    def on_train_end(self, *_: Any, **__: Any) -> None:
        self.clock.enter(None)
