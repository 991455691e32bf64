"""One optimizer step of a LaVIN: forward and backward of an accumulation's micro batches under
autocast, clipping, the optimizer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from recipes.data.batches import Batch
from recipes.data.encoding import IGNORED
from recipes.lavin.build import BuiltLavin
from recipes.phases import Listener, phase, silent
from recipes.training_step import TrainingStep

_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(built: BuiltLavin) -> torch.autocast:
    """The context that the spec's precision computes in."""
    dtype = _AUTOCAST.get(built.spec.precision)
    return torch.autocast(built.device.type, dtype, enabled=dtype is not None)


class LavinStep(TrainingStep):
    """`loss = step.step(batches)`. Dropout is a function of the spec's seed and the step alone."""

    def __init__(
        self, built: BuiltLavin, total_steps: int | None = None, listener: Listener = silent
    ) -> None:
        self.built = built
        scaler = torch.amp.GradScaler(built.device.type, enabled=built.spec.precision == "fp16")
        super().__init__(
            built.spec, built.model, built.device, total_steps, scaler, listener, "for LaVIN"
        )

    def step(self, batches: Sequence[Batch]) -> Tensor:
        answers = sum(int((batch["labels"] != IGNORED).sum()) for batch in batches)
        total = torch.zeros((), device=self.device)
        torch.manual_seed(self.spec.schedule.seed * 1_000_003 + self.step_index)
        with phase(self.listener, "step"):
            for batch in batches:
                with phase(self.listener, "forward"):
                    loss = self.forward(batch, num_items_in_batch=answers).loss
                with phase(self.listener, "backward"):
                    self.scaler.scale(loss).backward()
                total += loss.detach()
                del loss
            self.update()
        self.step_index += 1
        return total

    def forward(self, batch: Batch, **language: Any) -> Any:
        """The model's output on a batch of the host, under the spec's autocast."""
        sent = {key: value.to(self.device, non_blocking=True) for key, value in batch.items()}
        with autocast(self.built):
            return self.model(**sent, **language)
