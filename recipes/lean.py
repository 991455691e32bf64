"""The lean stack: the project's own training step on a built model.

Against the stock stack, at the same spec: frozen parts stay in 16 bits and no autocast runs; the
loss never holds more than a chunk of logits; layers are recomputed only where gradients reach;
adapters keep one copy of their input; the image tokenizer runs without a graph; kernels are
generated for each layer. Adapters and their optimizer states stay in fp32, as in stock: in bf16,
Adam's second moment (decay 0.999) would stop moving, its steps being below bf16's resolution.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from planner.spec import RunSpec
from recipes.adapters import Seeds, fuse
from recipes.build import Built
from recipes.data.batches import Batch
from recipes.dropout import use_kernels
from recipes.images import with_image_tokens
from recipes.layers import LayerOptions, decoder_layers, first_trainable_layer, prepare_layers
from recipes.loss import head_of, linear_cross_entropy, predicted_rows
from recipes.phases import Listener, phase, silent
from recipes.training_step import TrainingStep


@dataclass(frozen=True, slots=True)
class LeanOptions:
    """compile: None is on CUDA only; sub_batches: a micro batch is run in this many parts, its
    loss and gradients unchanged; split_layers: see recipes.layers; fuse_adapters: see
    recipes.fused; kernels: this project's Triton kernels on CUDA."""

    compile: bool | None = None
    fuse_adapters: bool = True
    split_layers: bool = True
    sub_batches: int = 1
    kernels: bool = True


DEFAULT_OPTIONS = LeanOptions()


class LeanStep(TrainingStep):
    """One optimizer step at a time: `loss = step.step(batches)`.

    Owns the dropout seeds beside what every training step owns. The built model must have been
    built with stack "lean".
    """

    def __init__(
        self,
        built: Built,
        spec: RunSpec,
        *,
        total_steps: int | None = None,
        options: LeanOptions = DEFAULT_OPTIONS,
        listener: Listener = silent,
    ) -> None:
        self.built, self.options = built, options
        compiled = built.device.type == "cuda" if options.compile is None else options.compile
        model, self.base = built.model.train(), built.base
        use_kernels(options.kernels)
        fused = options.fuse_adapters and spec.method == "lora"
        self._seeds = fuse(model, built.device) if fused else Seeds(0, built.device)
        self._freeze_unreached()
        prepare_layers(
            self.base,
            LayerOptions(compiled, spec.gradient_checkpointing, options.split_layers),
        )
        self._head = head_of(self.base)
        self._trunk_trains = any(p.requires_grad for p in self.base.model.parameters())
        super().__init__(
            spec, model, built.device, total_steps,
            torch.amp.GradScaler(enabled=spec.precision == "fp16"), listener, "on the lean stack",
        )  # fmt: skip

    def step(self, batches: Sequence[Batch]) -> Tensor:
        parts = [part for batch in batches for part in _parts(batch, self.options.sub_batches)]
        rows = [predicted_rows(part["labels"]) for part in parts]
        count = sum(len(targets) for _, targets in rows)
        total = torch.zeros((), device=self.device)
        with phase(self.listener, "step"):
            for index, (part, (positions, targets)) in enumerate(zip(parts, rows, strict=True)):
                self._seeds.set(self.spec.schedule.seed, self.step_index, index)
                with phase(self.listener, "forward"):
                    loss = self._loss(part, positions, targets, count)
                with phase(self.listener, "backward"):
                    self.scaler.scale(loss).backward()
                total += loss.detach()
            self.update()
        self.step_index += 1
        return total

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> tuple[Tensor, int]:
        """(summed loss, predicted tokens) of one batch, without dropout."""
        positions, targets = predicted_rows(batch["labels"])
        self.model.eval()
        with phase(self.listener, "eval"):
            loss = self._loss(batch, positions, targets, 1)
        self.model.train()
        return loss, len(targets)

    def _loss(self, batch: Batch, positions: Tensor, targets: Tensor, count: int) -> Tensor:
        head = self._head
        hidden = self._hidden(batch)
        with phase(self.listener, "loss"):
            dropping = self.model.training and head.dropout > 0
            return linear_cross_entropy(
                hidden, _sent(positions, hidden.device), _sent(targets, hidden.device), head,
                count, seed=self._seeds.head if dropping else None,
            )  # fmt: skip

    def _hidden(self, batch: Batch) -> Tensor:
        device = self.device
        inputs = {
            key: _sent(value, device)
            for key, value in batch.items()
            if key not in ("labels", "pixel_values")
        }
        with nullcontext() if self._trunk_trains else torch.no_grad():
            inputs["input_ids"] = with_image_tokens(
                self.base, inputs["input_ids"], batch.get("pixel_values")
            )
            return self.base.model(**inputs, use_cache=False).last_hidden_state

    def _freeze_unreached(self) -> None:
        """The image tokenizer gets no gradient in any setting (argmin stands behind it)."""
        tokenizer = getattr(getattr(self.base, "model", None), "vqmodel", None)
        if tokenizer is not None:
            tokenizer.requires_grad_(False)


def reached_layers(built: Built) -> int:
    """How many decoder layers a backward pass runs through."""
    layers = decoder_layers(built.base)
    return len(layers) - first_trainable_layer(layers)


def _parts(batch: Batch, count: int) -> list[Batch]:
    if count == 1:
        return [batch]
    size = len(batch["input_ids"])
    images = len(batch["pixel_values"]) // size if "pixel_values" in batch else 0
    parts = []
    for start in range(0, size, -(-size // count)):
        stop = min(size, start + -(-size // count))
        part = {k: v[start:stop] for k, v in batch.items() if k != "pixel_values"}
        if images:
            part["pixel_values"] = batch["pixel_values"][start * images : stop * images]
        parts.append(part)
    return parts


def _sent(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor.to(device, non_blocking=True)
