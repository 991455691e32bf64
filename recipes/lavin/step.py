"""One optimizer step of a LaVIN: forward and backward of an accumulation's micro batches under
autocast, clipping, the optimizer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, get_scheduler

from planner.errors import UnsupportedError
from recipes.data.encoding import IGNORED
from recipes.lavin.build import BuiltLavin
from recipes.phases import Listener, phase, silent
from recipes.stock import training_arguments

Batch = dict[str, Tensor]
_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(built: BuiltLavin) -> torch.autocast:
    """The context that the spec's precision computes in."""
    dtype = _AUTOCAST.get(built.spec.precision)
    return torch.autocast(built.device.type, dtype, enabled=dtype is not None)


class LavinStep:
    """`loss = step.step(batches)`: the optimizer of the spec's name as Trainer makes it, and its
    linear schedule. Dropout is a function of the spec's seed and the step alone."""

    def __init__(
        self, built: BuiltLavin, total_steps: int | None = None, listener: Listener = silent
    ) -> None:
        self.built, self.spec, self.listener = built, built.spec, listener
        self.model = built.model
        self.step_index = 0
        self.trained = list(self.model.trained_parameters().values())
        self.optimizer = self._optimizer()
        schedule = self.spec.schedule
        self.scheduler = get_scheduler(
            "linear", self.optimizer, num_warmup_steps=schedule.warmup_steps,
            num_training_steps=total_steps or schedule.max_steps or 1,
        )  # fmt: skip
        self._scaler = torch.amp.GradScaler(
            built.device.type, enabled=self.spec.precision == "fp16"
        )

    def step(self, batches: Sequence[Batch]) -> Tensor:
        """One optimizer step; its loss, detached: the mean over every answer token of it."""
        answers = sum(int((batch["labels"] != IGNORED).sum()) for batch in batches)
        total = torch.zeros((), device=self.built.device)
        torch.manual_seed(self.spec.schedule.seed * 1_000_003 + self.step_index)
        with phase(self.listener, "step"):
            for batch in batches:
                with phase(self.listener, "forward"):
                    loss = self.forward(batch, num_items_in_batch=answers).loss
                with phase(self.listener, "backward"):
                    self._scaler.scale(loss).backward()
                total += loss.detach()
                del loss
            self._update()
        self.step_index += 1
        return total

    def forward(self, batch: Batch, **language: Any) -> Any:
        """The model's output on a batch of the host, under the spec's autocast."""
        device = self.built.device
        sent = {key: value.to(device, non_blocking=True) for key, value in batch.items()}
        with autocast(self.built):
            return self.model(**sent, **language)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs beside the trained parameters."""
        return {
            "step_index": self.step_index,
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "scaler": self._scaler.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up where `state_dict` was taken."""
        self.step_index = state["step_index"]
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self._scaler.load_state_dict(state["scaler"])

    def _update(self) -> None:
        if self.spec.max_grad_norm:
            with phase(self.listener, "clip"):
                self._scaler.unscale_(self.optimizer)
                nn.utils.clip_grad_norm_(self.trained, self.spec.max_grad_norm)
        with phase(self.listener, "optimizer"):
            self._scaler.step(self.optimizer)
            self._scaler.update()
            self.scheduler.step()
            self.optimizer.zero_grad(set_to_none=True)

    def _optimizer(self) -> torch.optim.Optimizer:
        on_cpu = self.built.device.type == "cpu"
        arguments = training_arguments(self.spec, "unused", on_cpu=on_cpu, bf16=False, fp16=False)
        kind: Any
        kind, values = Trainer.get_optimizer_cls_and_kwargs(arguments, self.model)  # type: ignore[arg-type]
        if not isinstance(kind, type) or not issubclass(kind, torch.optim.Optimizer):
            raise UnsupportedError(f"optimizer {self.spec.optimizer!r} for LaVIN")
        make: Any = kind
        made: torch.optim.Optimizer = make(
            self.trained, weight_decay=arguments.weight_decay, **values
        )
        return made
