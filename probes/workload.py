"""The steps that a probe measures: the recipes' own two stacks, driven for a few steps."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from typing import Any

from transformers import PrinterCallback, TrainerCallback

from planner.errors import UnsupportedError
from probes.phases import PhaseClock, watching
from probes.samples import Pool, collate, make_pool
from recipes.build import Built
from recipes.stock import stock_trainer

# Evaluation batches a probe runs: one that warms up, two that are timed.
_EVALUATIONS = 3
# Nothing is logged, saved or evaluated between the steps that are timed.
_QUIET = {"logging_strategy": "no", "save_strategy": "no", "eval_strategy": "no"}


@dataclass(frozen=True, slots=True)
class Ran:
    """What a run leaves behind: its losses, and optimizer steps asked for but skipped (fp16)."""

    losses: tuple[float, ...]
    optimizer_steps: int
    optimizer_steps_skipped: int


def run_steps(built: Built, clock: PhaseClock, steps: int) -> Ran:
    """Run `steps` optimizer steps of the spec's stack, then its evaluation where the spec has one."""
    pools = _pools(built, steps)
    with watching(clock, built.model):
        run = {"stock": _run_stock, "lean": _run_lean}[built.spec.stack]
        losses = run(built, clock, steps, *pools)
    calls = clock.optimizer_calls
    return Ran(losses, calls, clock.step - calls)


def _pools(built: Built, steps: int) -> tuple[Pool, Pool | None]:
    spec = built.spec
    count = spec.micro_batch_size * spec.gradient_accumulation_steps * steps
    training = make_pool(spec, built.config, count)
    if not spec.evaluation_batch_size:
        return training, None
    return training, make_pool(spec, built.config, spec.evaluation_batch_size, seed=1)


class _StepEnds(TrainerCallback):
    def __init__(self, clock: PhaseClock) -> None:
        self.clock = clock

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.clock.begin()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.clock.step_end()

    def on_train_end(self, *_: Any, **__: Any) -> None:
        self.clock.enter(None)


def _run_stock(
    built: Built, clock: PhaseClock, steps: int, training: Pool, evaluation: Pool | None
) -> tuple[float, ...]:
    with tempfile.TemporaryDirectory() as folder:
        trainer = stock_trainer(
            built,
            built.spec,
            training,
            output_dir=folder,
            evaluation=evaluation,
            collate=collate,
            callbacks=[_StepEnds(clock)],
            **_QUIET,
            max_steps=steps,
        )
        trainer.remove_callback(PrinterCallback)
        result = trainer.train()
        if evaluation is not None:
            for _ in range(_EVALUATIONS):
                clock.hold("evaluation")
                trainer.evaluate()
                clock.release()
    return (float(result.training_loss),)


def _run_lean(
    built: Built, clock: PhaseClock, steps: int, training: Pool, evaluation: Pool | None
) -> tuple[float, ...]:
    raise UnsupportedError("the lean stack's step is not there yet")
