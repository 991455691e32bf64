"""Named phases of a training step, told to a listener: what probes time and what profiles show."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

from transformers import Trainer, TrainerCallback

Phase = Literal["load", "step", "forward", "loss", "backward", "clip", "optimizer", "eval"]
Listener = Callable[[Phase, bool], None]
"""Called with a phase and True where it begins, False where it ends. Phases nest: "step" holds
"forward" (which holds "loss" in the stock stack) and "backward"."""


def silent(phase: Phase, begins: bool) -> None:
    """The listener that hears nothing."""


@contextmanager
def phase(listener: Listener, name: Phase) -> Iterator[None]:
    """Tell `listener` where `name` begins and ends, also when it fails."""
    listener(name, True)
    try:
        yield
    finally:
        listener(name, False)


def instrument(trainer: Trainer, listener: Listener) -> Trainer:
    """Have a stock Trainer tell its phases. Nothing of what it computes changes."""
    _wrap(trainer, "get_batch_samples", "load", listener)
    _wrap(trainer, "training_step", "step", listener)
    _wrap(trainer, "compute_loss", "forward", listener)
    _wrap(trainer, "evaluate", "eval", listener)
    _wrap(trainer.accelerator, "backward", "backward", listener)
    _wrap(trainer.accelerator, "clip_grad_norm_", "clip", listener)
    base: Any = getattr(trainer.model, "get_base_model", lambda: trainer.model)()
    loss_function = base.loss_function

    @functools.wraps(loss_function)
    def told(*args: Any, **kwargs: Any) -> Any:
        with phase(listener, "loss"):
            return loss_function(*args, **kwargs)

    base.loss_function = told
    trainer.add_callback(_OptimizerPhase(listener))
    return trainer


class _OptimizerPhase(TrainerCallback):
    """The optimizer's own step: between Trainer's two callbacks around it."""

    def __init__(self, listener: Listener) -> None:
        self._listener = listener

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self._listener("optimizer", True)

    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self._listener("optimizer", False)


def _wrap(owner: Any, method: str, name: Phase, listener: Listener) -> None:
    original = getattr(owner, method)

    @functools.wraps(original)
    def told(*args: Any, **kwargs: Any) -> Any:
        with phase(listener, name):
            return original(*args, **kwargs)

    setattr(owner, method, told)
