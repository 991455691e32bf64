"""One optimizer step of the stock stack, in the order `Trainer` and accelerate run it on CUDA."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from accelerate.utils.operations import convert_outputs_to_fp32
from torch.utils.checkpoint import _Holder

from planner.spec import RunSpec
from probes.dry.autocast import CudaSemantics
from probes.dry.model import DTYPES, refused
from probes.dry.own import accepted
from probes.dry.recorder import Recorder

Batch = dict[str, torch.Tensor]


@dataclass
class StockStep:
    """Holds between steps what the Trainer holds: batches, the last loss, the gradient scale."""

    spec: RunSpec
    model: Any
    optimizer: torch.optim.Optimizer
    recorder: Recorder
    semantics: CudaSemantics
    make_batch: Callable[[], Batch]
    _held: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._dtype = DTYPES[self.spec.precision] if self.spec.precision != "fp32" else None
        self._parameters = [p for p in self.model.parameters() if p.requires_grad]
        self._forward = self._prepared_forward()
        for parameter in self._parameters:
            parameter.register_post_accumulate_grad_hook(self._label_gradient)
        if self.spec.gradient_checkpointing:
            with refused("gradient_checkpointing"):
                self.model.gradient_checkpointing_enable(
                    gradient_checkpointing_kwargs={
                        "use_reentrant": False,
                        "context_fn": self._checkpoint_contexts,
                    }
                )

    def run(self) -> None:
        """One optimizer step: the micro batches, clip, update, zero. All batches are held, but of
        an accumulation the first two are traced: from the second on they repeat exactly."""
        self._fetch()
        with mock.patch("torch.utils.checkpoint._Holder", self._holder):
            for inputs in self._held["batches"][:2]:
                self._held["inputs"] = inputs
                loss = self._micro_step(inputs)
                self._held["total"] += loss
        if self.spec.max_grad_norm > 0:
            with self.recorder.during("clip"):
                self._held["norm"] = self._clip()
        with self.recorder.during("optimizer"), torch.no_grad():
            self.optimizer.step()
        with self.recorder.during("zero_grad"):
            self.model.zero_grad()

    def evaluate(self, inputs: Batch) -> None:
        """A prediction step with the loss only, as `Trainer.evaluate` without metrics."""
        self.model.eval()
        with self.recorder.during("evaluate"), torch.no_grad():
            outputs = self._forward(**accepted(self.model, inputs))
            if not isinstance(outputs, dict):
                outputs = {"loss": outputs[0], **dict(enumerate(outputs[1:]))}
            loss = outputs["loss"].mean().detach()
            logits = tuple(v for k, v in outputs.items() if k != "loss" and v is not None)
            del outputs, logits, loss

    def _fetch(self) -> None:
        """All micro batches of the step go to the device before the last step's are dropped."""
        count = self.spec.gradient_accumulation_steps
        with self.recorder.during("inputs", "inputs"):
            batches = [self.make_batch() for _ in range(count)]
            for batch in batches:
                for tensor in batch.values():
                    self.recorder.track(tensor, "input batch")
            self._held["batches"] = batches
            self._held["items"] = torch.full((), 1, dtype=torch.int64, device="meta")
            if "total" not in self._held:
                self._held["total"] = torch.zeros((), device="meta")

    def _holder(self) -> Any:
        """torch's checkpoint makes one for each tensor that a region saves: a hook's work."""
        self.recorder.work.micro_batch.hooks += 1
        return _Holder()

    def _micro_step(self, inputs: Batch) -> torch.Tensor:
        self.model.train()
        with self.recorder.during("forward"):
            loss = self._loss(inputs)
        if self.spec.precision == "fp16":
            scale = self._held.setdefault("scale", torch.ones((), device="meta"))
            with self.recorder.during("backward"):
                (loss * scale).backward()
        else:
            with self.recorder.during("backward"):
                loss.backward()
        return loss.detach()

    def _loss(self, inputs: Batch) -> torch.Tensor:
        given = {**inputs, "num_items_in_batch": self._held["items"]}
        outputs = self._forward(**accepted(self.model, given))
        del given
        loss = outputs["loss"] if isinstance(outputs, dict) else outputs[0]
        loss *= 1  # average_tokens_across_devices: in place, over the number of processes
        return loss

    def _prepared_forward(self) -> Callable[..., Any]:
        """accelerate's `prepare_model`: autocast around forward, outputs turned to fp32."""

        def forward(*args: Any, **kwargs: Any) -> Any:
            with self.semantics, self.semantics.autocast(self._dtype):
                return self.model(*args, **kwargs)

        if self._dtype is None:
            return forward
        return convert_outputs_to_fp32(forward)

    def _checkpoint_contexts(self) -> tuple[Any, Any]:
        return nullcontext(), Recomputation(self)

    def _clip(self) -> torch.Tensor:
        return torch.nn.utils.clip_grad_norm_(self._parameters, self.spec.max_grad_norm)

    def _label_gradient(self, parameter: torch.Tensor) -> None:
        if parameter.grad is not None:
            self.recorder.label(parameter.grad, "gradients")


class Recomputation:
    """A checkpointed forward run again inside backward: the mode and autocast must be entered."""

    def __init__(self, step: StockStep) -> None:
        self._step = step
        self._managers: list[Any] = []

    def __enter__(self) -> None:
        step = self._step
        self._managers = [
            step.recorder.during("recompute"), step.semantics,
            step.semantics.autocast(step._dtype),
        ]  # fmt: skip
        for manager in self._managers:
            manager.__enter__()

    def __exit__(self, *error: Any) -> None:
        for manager in reversed(self._managers):
            manager.__exit__(*error)
