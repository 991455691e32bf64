"""Tracing a run spec: build, load, adapt, two optimizer steps, an evaluation step."""

from __future__ import annotations

import copy
import time

import torch
from transformers import PretrainedConfig, PreTrainedModel

from planner.memory.outliers import OutlierModel
from planner.spec import RunSpec
from probes.dry import model as models
from probes.dry.attribution import categorise
from probes.dry.autocast import CudaSemantics
from probes.dry.batch import Batches
from probes.dry.components import components, count_parameters
from probes.dry.cuda_view import cuda_view, flash_view
from probes.dry.events import Event, Trace
from probes.dry.lean import LeanRun, adapt_lean
from probes.dry.load import load
from probes.dry.optimizers import create_optimizer
from probes.dry.own import OwnCode, resolve
from probes.dry.recorder import Recorder
from probes.dry.scope import Scope
from probes.dry.step import StockStep
from probes.dry.target import Target


def trace(
    spec: RunSpec, *, layers: int | None = None, config: PretrainedConfig | None = None,
    steps: int = 2, target: Target | None = None, code: OwnCode | None = None,
) -> Trace:  # fmt: skip
    """Trace `spec` on the meta device. `layers`: build that many decoder layers; `config`: a
    transformers config instead of `spec.model`; `code`: what code of the user's own may run.
    Raises InputError for a model that cannot be built.
    """
    started = time.perf_counter()
    own = None if config else resolve(spec.model, code or OwnCode())
    if own is not None:
        config = own.config
    config = copy.deepcopy(config) if config else models.load_config(spec.model)
    config = models.shortened(config, layers)
    scope = Scope()
    recorder = Recorder(scope)
    recorder.target = target or Target()
    semantics = CudaSemantics(recorder)
    with flash_view():
        base = models.build(spec, config, own.cls if own else None)
    recorder.outliers, recorder.sequence_length = _outliers(spec, base), spec.sequence_length
    if own is not None and own.note:
        recorder.note_unknown(own.note)
    batches = Batches(spec, config, base)
    parts, counts = components(base), count_parameters(base)
    with scope.hooked(), recorder, cuda_view(semantics):
        scope.name(base)
        with recorder.during("load", "parameters"):
            load(recorder, base)
            base_events = len(recorder.events)
            model = (
                adapt_lean(base, spec)
                if spec.stack == "lean"
                else models.adapt(base, spec, recorder.empty_cache)
            )
        scope.name(model)
        if model is not base:
            parts = {f"base_model.model.{path}": part for path, part in parts.items()}
            # peft wraps the adapted layers, so that their parameters lie one level lower
            parts |= {f"{path}.base_layer": part for path, part in parts.items()}
        for path, tensor in [*model.named_parameters(), *model.named_buffers()]:
            recorder.place(tensor, path.rpartition(".")[0])
        loaded = recorder.take()
        step: StockStep | LeanRun
        if spec.stack == "lean":
            step = LeanRun(spec, config, base, model, batches, recorder, semantics)
        else:
            step = _stock_step(spec, batches, model, recorder, semantics)
        for number in range(1, steps + 1):
            recorder.step = number
            step.run()
        events = recorder.take()
        evaluation = _evaluate(batches, step) if spec.evaluation_batch_size else []
    vocabulary = getattr(config.get_text_config(), "vocab_size", 0)
    categorise(events, vocabulary)
    categorise(evaluation, vocabulary)
    result = Trace(
        loaded, events, tuple(recorder.unknown), evaluation,
        total_parameters=sum(counts.values()),
        trainable_parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
        expandable=spec.expandable_segments or spec.stack == "lean",
        model_type=config.model_type, components=parts, parameters_by_component=counts,
        paged_bytes=recorder.paged_bytes, work=recorder.work.step, base_events=base_events,
    )  # fmt: skip
    result.seconds = time.perf_counter() - started
    return result


def _stock_step(
    spec: RunSpec, batches: Batches, model: torch.nn.Module, recorder: Recorder,
    semantics: CudaSemantics,
) -> StockStep:  # fmt: skip
    with recorder.during("optimizer", "optimizer_states"):
        optimizer = create_optimizer(spec, model)
    return StockStep(
        spec, model, optimizer, recorder, semantics,
        lambda: batches.make(spec.micro_batch_size),
    )  # fmt: skip


def _evaluate(batches: Batches, step: StockStep | LeanRun) -> list[Event]:
    if isinstance(step, LeanRun):
        step.evaluate()
        return step.recorder.take()
    with step.recorder.during("inputs", "inputs"):
        batch = batches.make(batches.spec.evaluation_batch_size)
        for tensor in batch.values():
            step.recorder.track(tensor, "input batch")
    step.evaluate(batch)
    return step.recorder.take()


def _outliers(spec: RunSpec, base: PreTrainedModel) -> OutlierModel | None:
    """The decoder's numbers, of any config that has them."""
    text = base.config.get_text_config()
    heads = getattr(text, "num_attention_heads", None)
    layers = getattr(text, "num_hidden_layers", None)
    if spec.quantization != "int8" or spec.int8_outliers == "few" or not (heads and layers):
        return None
    width = text.hidden_size
    queries = heads * (getattr(text, "head_dim", None) or width // heads)
    names = {path.rpartition(".")[2] for path, _ in base.named_modules()}
    act = getattr(text, "hidden_activation", None) or getattr(text, "hidden_act", None) or "silu"
    scaled = "Scaled" in type(base.get_input_embeddings()).__name__  # Gemma's
    return OutlierModel(
        width, queries, layers, "q_norm" in names, "gelu" in act, scaled,
        "pre_feedforward_layernorm" in names,
    )  # fmt: skip
