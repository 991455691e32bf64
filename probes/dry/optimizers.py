"""The optimizer that `Trainer` would create: its own method, on a Trainer that was never begun."""

from __future__ import annotations

import torch
from bitsandbytes.optim.optimizer import GlobalOptimManager
from transformers import Trainer, TrainingArguments

from planner.errors import InputError, Problem
from planner.spec import RunSpec


def create_optimizer(spec: RunSpec, model: torch.nn.Module) -> torch.optim.Optimizer:
    """Class, settings and groups by transformers; with 8 bits an embedding keeps 32-bit states.

    Raises InputError for an optimizer whose package is not installed.
    """
    GlobalOptimManager.get_instance().initialize()  # it remembers the overrides of other models
    trainer = object.__new__(Trainer)
    trainer.args = TrainingArguments(
        output_dir="unused", optim=spec.optimizer, use_cpu=True, report_to=[],
        learning_rate=spec.schedule.learning_rate,
    )  # fmt: skip
    trainer.model, trainer.optimizer, trainer.optimizer_cls_and_kwargs = model, None, None
    try:
        return Trainer.create_optimizer(trainer)
    except (ImportError, ValueError) as error:
        raise InputError(Problem("optimizer", str(error).splitlines()[0], spec.optimizer)) from None
