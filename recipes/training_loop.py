"""Training on a folder, step after step: losses.jsonl grows by a line a step, checkpoints hold what
is trained, and a run that was stopped or killed goes on bit for bit from the newest of them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from planner.errors import VramwiseError
from recipes.checkpoints import CheckpointError, load_checkpoint, save_checkpoint
from recipes.data.batches import Batches
from recipes.training_step import TrainingStep, trained_parameters

Say = Callable[[str], None]


class TrainingError(VramwiseError):
    """The run cannot go on; says what is kept."""


class TrainingLoop:
    """The steps of one run on the folder `output`. steps: where the run ends; identity: all that a
    run must share with a checkpoint to go on from it."""

    def __init__(
        self, output: Path, step: TrainingStep, batches: Batches, steps: int, identity: str,
        say: Say,
    ) -> None:  # fmt: skip
        self.step, self.batches, self.steps = step, batches, steps
        self.identity, self.say = identity, say
        self.checkpoints = output / "checkpoints"
        self.losses: list[float] = []
        self.began_at = 0  # the step that `train` went on from
        self._lines = output / "losses.jsonl"

    def train(
        self, stop_after: int | None = None, after_step: Callable[[int], None] = lambda done: None
    ) -> list[float]:
        """From the newest checkpoint to the end (or to step `stop_after`), saving as the spec says:
        all losses so far. after_step: called with the steps done, before any checkpoint of them.

        Raises TrainingError for a loss that is no number, CheckpointError for a checkpoint that
        cannot be written or trusted. Nothing of an earlier checkpoint is touched by either.
        """
        self._resume()
        self.began_at = self.step.step_index
        every = self.step.spec.schedule.save_every_steps
        last = min(self.steps, stop_after or self.steps)
        while self.step.step_index < last:
            self._one_step()
            done = self.step.step_index
            after_step(done)
            if (every and done % every == 0) or done == self.steps:
                self.save()
        return self.losses

    def save(self) -> None:
        """A checkpoint of now: what is trained, and the step's state."""
        trained = trained_parameters(self.step.model)
        made = save_checkpoint(
            self.checkpoints, self.step.step_index,
            {"trained": {n: p.detach().cpu() for n, p in trained.items()},
             "step": self.step.state_dict(), "losses": self.losses, "spec": self.identity},
        )  # fmt: skip
        self.say(f"step {made.step}: saved {made.path.name}")

    def _one_step(self) -> None:
        index = self.step.step_index
        loss = self.step.step(self.batches.step(index)).item()
        if not math.isfinite(loss):
            kept = sorted(self.checkpoints.glob("step-*.json"))
            rest = f"{kept[-1].stem} is kept" if kept else "there is no checkpoint yet"
            raise TrainingError(f"the loss is {loss} at step {index + 1}: {rest}")
        self.losses.append(loss)
        with self._lines.open("a", encoding="utf-8") as file:
            file.write(_line(index + 1, loss))

    def _resume(self) -> None:
        if self.step.step_index:
            return
        found = load_checkpoint(self.checkpoints)
        if found is None:
            self._lines.unlink(missing_ok=True)
            return
        checkpoint, state = found
        if state["spec"] != self.identity:
            raise CheckpointError(f"{checkpoint.path} is of another spec: choose another folder")
        self._load(state)
        self.say(f"going on from step {checkpoint.step}")

    def _load(self, state: dict[str, Any]) -> None:
        parameters = dict(self.step.model.named_parameters())
        with torch.no_grad():
            for name, values in state["trained"].items():
                parameters[name].copy_(values)
        self.step.load_state_dict(state["step"])
        self.losses = list(state["losses"])
        partial = self._lines.with_suffix(".partial")
        lines = [_line(number, loss) for number, loss in enumerate(self.losses, start=1)]
        partial.write_text("".join(lines), encoding="utf-8")
        partial.replace(self._lines)


def _line(step: int, loss: float) -> str:
    return json.dumps({"step": step, "loss": loss}) + "\n"
