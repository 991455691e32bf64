"""What every training step of this project shares: Trainer's own optimizer and schedule by the
spec's name, the update behind a backward pass, and the state that a resumed run needs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, get_scheduler

from planner.errors import UnsupportedError
from planner.spec import RunSpec
from recipes.data.batches import Batch
from recipes.phases import Listener, phase
from recipes.stock import training_arguments


class TrainingStep(ABC):
    """One optimizer step at a time: `loss = step.step(batches)`. What of the model trains is
    settled when this is made; `where` names the step in the error for an optimizer it lacks."""

    def __init__(
        self, spec: RunSpec, model: nn.Module, device: torch.device, total_steps: int | None,
        scaler: torch.amp.GradScaler, listener: Listener, where: str,
    ) -> None:  # fmt: skip
        self.spec, self.model, self.device, self.listener = spec, model, device, listener
        self.step_index = 0
        self.trained = list(trained_parameters(model).values())
        self.optimizer = self._made_optimizer(where)
        self.scheduler = get_scheduler(
            "linear", self.optimizer, num_warmup_steps=spec.schedule.warmup_steps,
            num_training_steps=total_steps or spec.schedule.max_steps or 1,
        )  # fmt: skip
        self.scaler = scaler

    @abstractmethod
    def step(self, batches: Sequence[Batch]) -> Tensor:
        """One optimizer step over the micro batches of an accumulation: their loss, a detached 0-d
        tensor on the device (the mean over every predicted token of all of them)."""

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs beside the trained parameters."""
        return {
            "step_index": self.step_index,
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "scaler": self.scaler.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up where `state_dict` was taken."""
        self.step_index = state["step_index"]
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.scaler.load_state_dict(state["scaler"])

    def update(self) -> None:
        """Gradients clipped as the spec says, applied and dropped; the schedule goes on."""
        if self.spec.max_grad_norm:
            with phase(self.listener, "clip"):
                self.scaler.unscale_(self.optimizer)
                nn.utils.clip_grad_norm_(self.trained, self.spec.max_grad_norm)
        with phase(self.listener, "optimizer"):
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.scheduler.step()
            self.optimizer.zero_grad(set_to_none=True)

    def _made_optimizer(self, where: str) -> torch.optim.Optimizer:
        """Trainer's own optimizer class and arguments for the spec's name."""
        arguments = training_arguments(
            self.spec, "unused", on_cpu=self.device.type == "cpu", bf16=False, fp16=False
        )
        model: Any = self.model
        kind: Any
        kind, values = Trainer.get_optimizer_cls_and_kwargs(arguments, model)
        if not isinstance(kind, type) or not issubclass(kind, torch.optim.Optimizer):
            raise UnsupportedError(f"optimizer {self.spec.optimizer!r} {where}")
        make: Any = kind
        made: torch.optim.Optimizer = make(
            self.trained, weight_decay=arguments.weight_decay, **values
        )
        return made


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that train, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}
