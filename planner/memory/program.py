"""One spec's step, run on shadow tensors: what stays, what each instant holds, the work done."""

# Annotations stay objects here: named tuples would compile each string at import.
import gc
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from math import prod
from typing import Any, NamedTuple

from planner.dtypes import DType
from planner.errors import InputError, Problem, UnsupportedError
from planner.memory.autograd import NO_GRADIENT
from planner.memory.loaded import EMBEDDINGS, Loaded
from planner.memory.loading import Loading
from planner.memory.ops import Engine
from planner.memory.optimizer import Optimizer
from planner.memory.optimizers import find_optimizer
from planner.memory.outliers import outlier_model
from planner.memory.states import StateBytes, state_bytes
from planner.memory.step import (
    Batch,
    Forward,
    InBackward,
    StepWork,
    inputs,
    run_micro_batches,
    run_optimizer,
    run_step,
    stock_loss,
)
from planner.memory.storage import Instant, Recorder
from planner.memory.stretch import RUN_LAYERS, MarkedRecorder, NotAlikeError, stretch
from planner.memory.target import kernels_device
from planner.memory.tensor import Tensor
from planner.memory.work import Work
from planner.models.lora import target_modules
from planner.models.registry import Model
from planner.models.tree import ModelTree
from planner.spec import RunSpec

_DECODER_LAYER = re.compile(r"\blayers\.(\d+)\.")
_TOWERS = ("model.vision_tower.", "model.visual.", "vision.")  # their layers are all run


class Program(NamedTuple):
    """The result of a run: static tensors, optimizer states, the recorded step, its work."""

    loaded: Loaded
    loading: Loading
    states: StateBytes
    recorder: Recorder
    work: StepWork
    trainable_with_gradient: int

    @property
    def resident_bytes(self) -> int:
        """Sum of the tensors that stay; the allocator's blocks hold a little more."""
        return self.loading.resident_bytes

    @property
    def static_bytes(self) -> int:
        """What is live throughout the step: the resident tensors and the optimizer states."""
        return self.resident_bytes + self.states.device_bytes

    @property
    def peak(self) -> Instant:
        """The instant with most bytes live."""
        return max(self.recorder.instants, key=lambda instant: instant.peak_bytes)


def load(spec: RunSpec, model: Model) -> Loaded:
    """The model's state after loading: quantization, dtypes, adapters."""
    load_own = getattr(model.family, "load", None)
    if load_own is not None:
        loaded: Loaded = load_own(spec, model.tree)
        return loaded
    if spec.method == "lora" and spec.adapter == "adaption_prompt":
        from planner.models import adaption_prompt  # loaded for its runs alone

        return adaption_prompt.load(spec, model)
    adapted: frozenset[str] = frozenset()
    if spec.method == "lora":
        adapted = _adapted(model.tree, spec.lora.target_modules)
        _check_adapted(model.tree, adapted)
    elif spec.quantization != "none":
        raise UnsupportedError(
            f"method: 'full' cannot train {spec.quantization} weights; allowed: quantization "
            "'none' with 'full', or method 'lora'"
        )
    masked = 0
    if spec.images_per_sample:
        masked = model.family.image_features(model.geometry, spec.image_size)
    masked *= spec.images_per_sample
    return Loaded(
        spec, model.tree, adapted, masked_labels=masked, outliers=outlier_model(spec, model.text)
    )


@lru_cache(maxsize=16)
def _adapted(tree: ModelTree, targets: tuple[str, ...] | str) -> frozenset[str]:
    return frozenset(module.path for module in target_modules(tree, targets))


def _check_adapted(tree: ModelTree, adapted: frozenset[str]) -> None:
    """Adapters on linears and on the decoder's embeddings have a step program, others none."""
    for path in sorted(adapted):
        kind = tree.by_path[path].kind
        if kind != "linear" and not path.endswith(EMBEDDINGS):
            name = "a convolution" if kind == "conv" else f"an {kind}"
            raise UnsupportedError(
                f"lora.target_modules: {path} is {name}, whose adapter the planner does not model; "
                "`vramwise fit --exact` traces it"
            )


def run(spec: RunSpec, model: Model, recorder: Recorder | None = None) -> Program:
    """Run one optimizer step of `spec` on shadow tensors. With a recorder of the caller's, every
    layer is run; else a few, and their events stretched to all."""
    with paused_collector():
        return _run(spec, model, recorder)


def engine_for(spec: RunSpec, recorder: Recorder | None = None) -> Engine:
    """An engine with the fused kernels of the spec's card."""
    engine = Engine(recorder)
    engine.cudnn_attention = kernels_device(spec) is None
    return engine


@contextmanager
def paused_collector() -> Iterator[None]:
    """No cyclic garbage collection inside: the engine frees by reference counts alone, and the
    collector would walk its many live objects again and again."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _run(spec: RunSpec, model: Model, recorder: Recorder | None) -> Program:
    optimizer = find_optimizer(spec.optimizer)
    check_accumulation(spec, optimizer)
    if recorder is None and may_stretch(model, spec):
        try:
            return _run_few(spec, model, optimizer)
        except NotAlikeError:
            pass
    loaded = load(spec, model)
    engine = engine_for(spec, recorder)
    batches = make_batches(engine.recorder, spec, model)
    work = run_step(engine, loaded, forward_of(model), batches[0], optimizer)
    return _program(loaded, optimizer, engine.recorder, work)


def may_stretch(model: Model, spec: RunSpec) -> bool:
    """Whether running a few of the decoder layers tells of all: not where the lowest have no
    prompts, nor where the optimizer's step drops gradients, which a stretched run holds apart."""
    if find_optimizer(spec.optimizer).replaces_gradients:
        return False
    if spec.method == "lora" and spec.adapter == "adaption_prompt":
        return False
    text = model.text
    return text.num_hidden_layers > RUN_LAYERS and len(set(text.layer_types)) == 1


def _run_few(spec: RunSpec, model: Model, optimizer: Optimizer) -> Program:
    """Run RUN_LAYERS decoder layers and stretch them to all; the optimizer's part on all."""
    key = _gradients_key(spec, optimizer)
    known = _gradients.get(key)
    if known is None or known.model is not model:
        known = _run_gradients(spec, model, optimizer)
        while len(_gradients) >= KEPT_GRADIENTS:
            del _gradients[next(iter(_gradients))]
    _gradients.pop(key, None)
    _gradients[key] = known  # the latest last
    loaded = load(spec, model)
    loaded.leaves = all_layers(known.leaves, known.dtypes, model.text.num_hidden_layers)
    recorder = known.recorder.copy()
    last = run_optimizer(Engine(recorder), loaded, optimizer)
    recorder.events += known.tail
    work = Work()
    work.add(known.work, 1)
    return _program(loaded, optimizer, recorder, StepWork(work, last))


class _Gradients(NamedTuple):
    """Forward and backward of a step, before clipping: the same whatever the optimizer.

    dtypes: of the gradients, by leaf; recorder: of all layers; tail: what is released at the end of
    the step; work: of a micro batch.
    """

    model: Model
    leaves: dict[str, Tensor]
    dtypes: dict[str, DType]
    recorder: Recorder
    tail: Any
    work: tuple[Any, ...]


KEPT_GRADIENTS = 8  # runs remembered for specs that differ in the optimizer or the card alone
_gradients: dict[RunSpec, _Gradients] = {}


def _gradients_key(spec: RunSpec, optimizer: Optimizer) -> RunSpec:
    """The spec without what forward and backward do not depend on."""
    return spec.model_copy(
        update={
            "device": kernels_device(spec),
            "device_memory": None,
            "host_memory": None,
            "optimizer": spec.optimizer if optimizer.in_backward else "sgd",
            "max_grad_norm": 0.0,
            "expandable_segments": False,
            "evaluation_batch_size": 0,
        }
    )


def _run_gradients(spec: RunSpec, model: Model, optimizer: Optimizer) -> _Gradients:
    layers = model.text.num_hidden_layers
    loaded = load(spec, model)
    loaded.decoder_layers = RUN_LAYERS
    few = MarkedRecorder()
    engine = engine_for(spec, few)
    few.work = lambda: engine.work.counters()
    batches = make_batches(few, spec, model)
    hook = InBackward(engine, optimizer) if optimizer.in_backward else None
    work = run_micro_batches(engine, loaded, forward_of(model), batches[0], hook)
    few.enter("end")
    if hook is not None:
        hook.mark(loaded.leaves.values())
    graded = [leaf for leaf in loaded.leaves.values() if leaf.grad is not None]
    dtypes = {leaf.name: leaf.grad.dtype for leaf in graded}
    for leaf in graded:
        leaf.grad = None
    batches.clear()
    work.add(few.layer_work(), layers - RUN_LAYERS)
    recorder, tail = stretch(few, layers)
    return _Gradients(model, loaded.leaves, dtypes, recorder, tail, work.counters())


def all_layers(
    leaves: dict[str, Tensor], graded: dict[str, DType], layers: int
) -> dict[str, Tensor]:
    """The leaves with a gradient of every decoder layer by name, from those of RUN_LAYERS, in the
    order they are met; those that layer 2 stands for share its tensor. A gradient is a dtype here:
    its bytes are in the recorder."""
    copies: dict[str, Tensor] = {}
    for name, dtype in graded.items():
        leaf = leaves[name]
        copies[name] = copy = Tensor(None, leaf.shape, leaf.dtype, True, name=name)
        copy.grad = Tensor(None, leaf.shape, dtype)
    names, twins = _all_names(tuple(leaves), tuple(graded), layers)
    return dict(zip(names, map(copies.__getitem__, twins), strict=True))


@lru_cache(maxsize=16)
def _all_names(
    names: tuple[str, ...], graded: tuple[str, ...], layers: int
) -> tuple[list[str], list[str]]:
    """The name of every parameter with a gradient, and of the one of `graded` that stands for it.
    names: of all leaves met."""
    found: list[tuple[str, str]] = []
    groups: dict[int, list[tuple[str, str, str]]] = {}
    for name in names:
        match = _DECODER_LAYER.search(name)
        if match is None or name.startswith(_TOWERS):
            found.append((name, name))
            continue
        index, (start, end) = int(match.group(1)), match.span(1)
        before, after = name[:start], name[end:]
        groups.setdefault(index, []).append((name, before, after))
        if index == RUN_LAYERS - 1 and len(groups[index]) == 1:
            for whole in range(2, layers - 1):
                found += [(f"{front}{whole}{back}", twin) for twin, front, back in groups[2]]
        if index != 2:
            whole = index if index < 2 else layers - 1
            found.append((f"{before}{whole}{after}", name))
    wanted = frozenset(graded)
    kept = [(name, twin) for name, twin in found if twin in wanted]
    return [name for name, _ in kept], [twin for _, twin in kept]


def _program(loaded: Loaded, optimizer: Optimizer, recorder: Recorder, work: StepWork) -> Program:
    graded = {name: leaf for name, leaf in loaded.leaves.items() if leaf.grad is not None}
    if not graded:
        raise InputError(NO_GRADIENT)
    states = state_bytes(loaded, optimizer, graded)
    alike = Counter(graded.values())  # layers share leaves
    count = sum(times * prod(leaf.shape) for leaf, times in alike.items())
    for leaf in alike:
        leaf.grad = None
    return Program(loaded, Loading(loaded), states, recorder, work, count)


def evaluation_run(spec: RunSpec, model: Model) -> Recorder:
    """The events of an evaluation forward."""
    loaded = load(spec, model)
    engine = engine_for(spec)
    size = spec.model_copy(update={"micro_batch_size": spec.evaluation_batch_size})
    batch = make_batch(engine.recorder, size, model)
    engine.training = False
    with engine.no_grad():
        engine.recorder.enter("evaluation")
        stock_loss(engine, loaded, forward_of(model), batch)
    engine.recorder.enter("end")
    del batch
    return engine.recorder


def forward_of(model: Model) -> Forward:
    """The family's step program."""
    forward = getattr(model.family, "forward", None)
    if forward is None:
        raise UnsupportedError(
            f"model: the {model.model_type} family has no step program yet; "
            "`vramwise fit --exact` traces it instead"
        )

    def run_forward(engine: Engine, loaded: Loaded, batch: Batch) -> tuple[Any, ...]:
        outputs: tuple[Any, ...] = forward(engine, loaded, model.geometry, batch)
        return outputs

    return run_forward


def alike_accumulation(spec: RunSpec) -> int:
    """The accumulation that stands for the spec's: of a step's memory, only Trainer's inputs grow
    beyond the second micro batch."""
    steps = spec.gradient_accumulation_steps
    return steps if spec.stack == "stock" else min(steps, 2)


def make_batches(recorder: Recorder, spec: RunSpec, model: Model) -> list[Batch]:
    """The inputs that are on the card throughout a step: `Trainer` fetches all micro batches of it
    first (get_batch_samples in trainer.py), other loops one at a time. All run like the first."""
    own_loop = spec.stack == "lean" or hasattr(model.family, "make_batch")
    count = 1 if own_loop else spec.gradient_accumulation_steps
    return [make_batch(recorder, spec, model) for _ in range(count)]


def make_batch(recorder: Recorder, spec: RunSpec, model: Model) -> Batch:
    """The inputs of one forward, images included."""
    make = getattr(model.family, "make_batch", None)
    if make is not None:
        made: Batch = make(model.geometry, spec)
        return made
    batch = inputs(recorder, spec.micro_batch_size, spec.sequence_length)
    if not spec.images_per_sample:
        return batch
    make_pixels = getattr(model.family, "pixels", None)
    if make_pixels is None:
        raise UnsupportedError(f"images_per_sample: not modelled for {model.model_type} yet")
    pixels = make_pixels(recorder, model.geometry, spec)
    return Batch(batch.ids, batch.labels, batch.mask, pixels)


def check_accumulation(spec: RunSpec, optimizer: Optimizer) -> None:
    """Trainer refuses to accumulate where a gradient is used at once (trainer_optimizer.py)."""
    if spec.optimizer.endswith("_layerwise") and spec.gradient_accumulation_steps > 1:
        message = f"cannot be accumulated: {optimizer.name} uses each gradient at once"
        raise InputError(
            Problem("gradient_accumulation_steps", message, spec.gradient_accumulation_steps, "1")
        )
