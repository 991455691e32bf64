"""The recipe's own LaVIN traced on the meta device by the dry probe's recorder: the real model, the
real step, stand-ins for CUDA's kernels alone."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from transformers import CLIPVisionModel, LlamaForCausalLM
from transformers.initialization import no_init_weights

from planner.spec import RunSpec
from probes.dry import model as models
from probes.dry.autocast import CudaSemantics
from probes.dry.cuda_view import cuda_view
from probes.dry.events import Trace
from probes.dry.load import load
from probes.dry.recorder import Recorder
from probes.dry.scope import Scope
from probes.dry.step import Recomputation
from recipes.lavin.build import BuiltLavin
from recipes.lavin.config import LavinConfig
from recipes.lavin.model import Lavin
from recipes.lavin.step import LavinStep
from recipes.lavin.synthetic import random_batch

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": None}


def build_on_meta(spec: RunSpec, config: LavinConfig) -> Lavin:
    """`recipes.lavin.build.build_lavin` without storage."""
    dtype = models.DTYPES[spec.weights_dtype]
    config.text._attn_implementation = config.vision._attn_implementation = spec.attention
    with torch.device("meta"), no_init_weights():
        text = LlamaForCausalLM._from_config(config.text, dtype=dtype)
        if spec.quantization != "none":
            models.quantize(text, spec)
        vision = CLIPVisionModel._from_config(config.vision, dtype=dtype)
        return Lavin(text, vision, config).train()


def trace_lavin(spec: RunSpec, config: LavinConfig, steps: int = 2) -> Trace:
    """Loading and `steps` optimizer steps, as `probes.dry.trace` records them."""
    model = build_on_meta(spec, config)
    recorder = Recorder(Scope())
    semantics = CudaSemantics(recorder)
    with recorder.scope.hooked(), recorder, cuda_view(semantics):
        recorder.scope.name(model)
        with recorder.during("load", "parameters"):
            load(recorder, model)  # type: ignore[arg-type]
        loaded = recorder.take()
        built = BuiltLavin(model, config, spec, torch.device("meta"))
        _checkpoint(model, spec, recorder, semantics)
        step = LavinStep(built, listener=_Phases(recorder).tell)
        with semantics:
            for number in range(1, steps + 1):
                recorder.step = number
                count = min(spec.gradient_accumulation_steps, 2)
                step.step([random_batch(spec, config, number * 2 + part) for part in range(count)])
        events = recorder.take()
    return Trace(loaded, events)


def _checkpoint(model: Lavin, spec: RunSpec, recorder: Recorder, semantics: CudaSemantics) -> None:
    """`Lavin.checkpoint_layers`, its recomputations under the modes that torch leaves behind."""
    if not spec.gradient_checkpointing:
        return
    entered: Any = SimpleNamespace(
        recorder=recorder, semantics=semantics, _dtype=_DTYPES[spec.precision]
    )
    model.checkpoint_layers()
    functions: set[Any] = set()
    for module in model.modules():
        function = getattr(module, "_gradient_checkpointing_func", None)
        if function is not None:
            functions.add(function)
            function.keywords["context_fn"] = lambda: (_Nothing(), Recomputation(entered))
    assert functions


class _Nothing:
    def __enter__(self) -> None: ...
    def __exit__(self, *error: Any) -> None: ...


class _Phases:
    """The recipe's phases as the recorder's."""

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder
        self.open: list[Any] = []

    def tell(self, name: str, begins: bool) -> None:
        if name == "step":
            return
        if begins:
            self.open.append(self.recorder.during(name))  # type: ignore[arg-type]
            self.open[-1].__enter__()
        else:
            self.open.pop().__exit__(None, None, None)


def named_shapes(model: nn.Module) -> list[tuple[str, tuple[int, ...]]]:
    """Parameters in torch's order."""
    return [(name, tuple(p.shape)) for name, p in model.named_parameters()]
