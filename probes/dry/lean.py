"""The lean stack traced: the recipes' own step on meta, its layers as inductor compiles them."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from peft import get_peft_model
from transformers import PretrainedConfig, PreTrainedModel

from planner.spec import RunSpec
from probes.dry.attention import attend
from probes.dry.autocast import CudaSemantics
from probes.dry.batch import Batches
from probes.dry.events import Phase
from probes.dry.lean_kernels import lean_kernels
from probes.dry.recorder import Recorder
from recipes.build import Built, lora_config
from recipes.lean import LeanOptions, LeanStep

_PHASES: dict[str, Phase] = {
    "forward": "forward", "loss": "forward", "backward": "backward", "clip": "clip",
    "optimizer": "optimizer", "eval": "evaluate",
}  # fmt: skip


def adapt_lean(base: PreTrainedModel, spec: RunSpec) -> torch.nn.Module:
    """Frozen parts stay in 16 bits: no k-bit preparation."""
    if spec.method == "full":
        return base.requires_grad_(True)
    base.requires_grad_(False)
    with torch.device("meta"):
        return get_peft_model(base, lora_config(spec))


def _compiler(recorder: Recorder) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """What stands for torch.compile: inductor itself, or nothing where this torch's has other names
    inside."""
    try:
        from probes.dry.compiled import Compiler  # loads inductor: only where something compiles
    except ImportError as error:
        recorder.note_unknown(
            f"layers traced uncompiled, they may hold more between kernels: {error}"
        )
        return lambda function: function
    return Compiler(recorder)


class LeanRun:
    """`recipes.lean.LeanStep` under a recorder; `run` is one optimizer step."""

    def __init__(
        self, spec: RunSpec, config: PretrainedConfig, base: PreTrainedModel,
        model: torch.nn.Module, batches: Batches, recorder: Recorder, semantics: CudaSemantics,
    ) -> None:  # fmt: skip
        self.spec, self.batches, self.recorder, self.semantics = spec, batches, recorder, semantics
        self._open: list[ExitStack] = []
        self._compiler = _compiler(recorder)
        built = Built(model, base, config, spec, torch.device("meta"))
        with self._as_on_cuda():
            self.step = LeanStep(
                built, spec, total_steps=10, options=LeanOptions(compile=True),
                listener=self._hear,
            )  # fmt: skip
        for parameter in self.step.trained:
            parameter.register_post_accumulate_grad_hook(
                lambda p: recorder.label(p.grad, "gradients")
            )

    def run(self) -> None:
        """The micro batches come from the host, as the recipe sends them."""
        count = min(2, self.spec.gradient_accumulation_steps)
        host = [self.batches.host(self.spec.micro_batch_size) for _ in range(count)]
        with self._as_on_cuda(), _settled():
            self.step.step(host)

    def evaluate(self) -> None:
        """One batch without dropout."""
        with self._as_on_cuda():
            self.step.evaluate(self.batches.host(self.spec.evaluation_batch_size))

    @contextmanager
    def _as_on_cuda(self) -> Iterator[None]:
        """Attention by CUDA's kernels, also where a layer is recomputed inside backward."""

        def attention(*args: Any, **kwargs: Any) -> torch.Tensor:
            return attend(self.recorder, *args, **kwargs)

        with (
            mock.patch("torch.nn.functional.scaled_dot_product_attention", attention),
            mock.patch("recipes.layers._compiled", self._compiler),
            lean_kernels(),
            self.semantics,
        ):
            yield

    def _hear(self, name: str, begins: bool) -> None:
        if name not in _PHASES:
            return
        if begins:
            stack = ExitStack()
            stack.enter_context(self.recorder.during(_PHASES[name]))
            self._open.append(stack)
        else:
            self._open.pop().close()


@contextmanager
def _settled() -> Iterator[None]:
    """What compiling leaves in reference cycles (arguments of the calls that compiled) is freed at
    the end, not whenever Python next looks for cycles: it belongs to no other step."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        with torch._dynamo.config.patch(run_gc_after_compile=False):
            yield
    finally:
        gc.collect(0)  # all that was made since
        if was_enabled:
            gc.enable()
