"""A training run on the stock stack: the same data through the real Trainer, pixels and all."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers.trainer_utils import get_last_checkpoint

from planner.spec import RunSpec
from recipes.build import Built
from recipes.data.batches import Batches
from recipes.data.encoding import Encoded, pixels
from recipes.stock import stock_trainer


class _Samples(Dataset):
    def __init__(self, samples: Sequence[Encoded]) -> None:
        self._samples = samples

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> Encoded:
        return self._samples[index]


def train_stock(
    built: Built, spec: RunSpec, batches: Batches, held_out: Sequence[Encoded], output: Path,
    steps: int, say: Callable[[str], None],
) -> tuple[list[float], int]:  # fmt: skip
    """Train to the end, from Trainer's newest checkpoint in `output` where there is one: (the loss
    of each step, the step it went on from). Padding is right-sided and unmasked, as in the lean
    stack: a causal model's real positions do not see it."""

    def collate(samples: list[Encoded]) -> dict[str, Tensor]:
        part = Batches(samples, len(samples), 1, batches.pad_id, 0, batches.pad_to)
        batch = part.batch(range(len(samples)))
        images = [s.image for s in samples if s.image is not None]
        if images:
            size = built.config.vq_config.resolution
            dtype = next(built.base.model.vqmodel.parameters()).dtype
            batch["pixel_values"] = torch.stack([pixels(i, size) for i in images]).to(dtype)
        return batch

    folder = output / "checkpoints"
    overrides: dict[str, Any] = {"max_steps": steps, "save_total_limit": 3}
    if not held_out:
        overrides["eval_strategy"] = "no"
    trainer = stock_trainer(
        built, spec, _Samples(batches.samples), output_dir=folder,
        evaluation=_Samples(held_out) if held_out else None, collate=collate,
        **overrides,
    )  # fmt: skip
    last = get_last_checkpoint(str(folder)) if folder.is_dir() else None
    began_at = 0
    if last:
        state = json.loads((Path(last) / "trainer_state.json").read_text(encoding="utf-8"))
        if state["global_step"] >= steps:  # Trainer would run one more
            return _losses(state["log_history"]), state["global_step"]
        began_at = state["global_step"]
        say(f"going on from {Path(last).name}")
    trainer.train(resume_from_checkpoint=last)
    return _losses(trainer.state.log_history), began_at


def _losses(history: list[dict[str, Any]]) -> list[float]:
    return [entry["loss"] for entry in history if "loss" in entry]
