"""One spec's step, run on shadow tensors: what stays, what each instant holds, the work done."""

# Annotations stay objects here: named tuples would compile each string at import.
import gc
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

from planner.dtypes import DType
from planner.errors import InputError, Problem, UnsupportedError
from planner.memory.loaded import Loaded
from planner.memory.loading import Loading, rounded
from planner.memory.ops import Engine
from planner.memory.optimizer import Optimizer, find_optimizer
from planner.memory.step import (
    Batch,
    Forward,
    StepWork,
    inputs,
    run_micro_batches,
    run_optimizer,
    run_step,
    stock_loss,
)
from planner.memory.storage import Instant, Recorder
from planner.memory.stretch import RUN_LAYERS, MarkedRecorder, NotAlikeError, stretch
from planner.memory.tensor import Tensor
from planner.models.lora import target_modules
from planner.models.registry import Model
from planner.spec import RunSpec

_DECODER_LAYER = re.compile(r"\blayers\.(\d+)\.")
_TOWERS = ("model.vision_tower.", "model.visual.")  # their layers are all run


class StateBytes(NamedTuple):
    """Optimizer states: on the device through the allocator, and paged (managed memory)."""

    device_bytes: int
    paged_bytes: int
    tensors: tuple[int, ...]


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
    adapted: frozenset[str] = frozenset()
    if spec.method == "lora":
        matched = target_modules(model.tree, spec.lora.target_modules)
        adapted = frozenset(module.path for module in matched)
    elif spec.quantization != "none":
        raise UnsupportedError(
            f"method: 'full' cannot train {spec.quantization} weights; allowed: quantization "
            "'none' with 'full', or method 'lora'"
        )
    return Loaded(spec, model.tree, adapted)


def run(spec: RunSpec, model: Model, recorder: Recorder | None = None) -> Program:
    """Run one optimizer step of `spec` on shadow tensors. With a recorder of the caller's, every
    layer is run; else a few, and their events stretched to all."""
    with paused_collector():
        return _run(spec, model, recorder)


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
    if recorder is None and may_stretch(model):
        try:
            return _run_few(spec, model, optimizer)
        except NotAlikeError:
            pass
    loaded = load(spec, model)
    engine = Engine(recorder)
    batch = make_batch(engine.recorder, spec, model)
    work = run_step(engine, loaded, forward_of(model), batch, optimizer)
    return _program(loaded, optimizer, engine.recorder, work)


def may_stretch(model: Model) -> bool:
    """Whether running a few of the decoder layers tells of all."""
    text = model.text
    return text.num_hidden_layers > RUN_LAYERS and len(set(text.layer_types)) == 1


def _run_few(spec: RunSpec, model: Model, optimizer: Optimizer) -> Program:
    """Run RUN_LAYERS decoder layers and stretch them to all; the optimizer's part on all."""
    layers = model.text.num_hidden_layers
    loaded = load(spec, model)
    loaded.decoder_layers = RUN_LAYERS
    few = MarkedRecorder()
    engine = Engine(few)
    few.work = lambda: engine.work.counters()
    batch = make_batch(few, spec, model)
    work = run_micro_batches(engine, loaded, forward_of(model), batch)
    few.enter("end")
    graded = [leaf for leaf in loaded.leaves.values() if leaf.grad is not None]
    dtypes = {leaf.name: leaf.grad.dtype for leaf in graded}
    for leaf in graded:
        leaf.grad = None
    del batch
    work.add(few.layer_work(), layers - RUN_LAYERS)
    recorder, tail = stretch(few, layers)
    loaded.decoder_layers = None
    loaded.leaves = all_layers(loaded.leaves, dtypes, layers)
    last = run_optimizer(Engine(recorder), loaded, optimizer)
    recorder.events += tail
    return _program(loaded, optimizer, recorder, StepWork(work, last))


def all_layers(
    leaves: dict[str, Tensor], graded: dict[str, DType], layers: int
) -> dict[str, Tensor]:
    """The leaves of every decoder layer, from those of RUN_LAYERS, in the order they are met. A
    gradient is a dtype here: its bytes are in the recorder."""
    found: dict[str, Tensor] = {}
    groups: dict[int, list[Tensor]] = {}

    def take(leaf: Tensor, name: str) -> None:
        copy = Tensor(None, leaf.shape, leaf.dtype, leaf.requires_grad, name=name)
        if leaf.name in graded:
            copy.grad = Tensor(None, leaf.shape, graded[leaf.name])
        found[name] = copy

    for leaf in leaves.values():
        match = _DECODER_LAYER.search(leaf.name)
        if match is None or leaf.name.startswith(_TOWERS):
            take(leaf, leaf.name)
            continue
        index = int(match.group(1))
        groups.setdefault(index, []).append(leaf)
        if index == RUN_LAYERS - 1 and len(groups[index]) == 1:
            for whole in range(2, layers - 1):
                for twin in groups[2]:
                    take(twin, twin.name.replace("layers.2.", f"layers.{whole}.", 1))
        if index != 2:
            whole = index if index < 2 else layers - 1
            take(leaf, leaf.name.replace(f"layers.{index}.", f"layers.{whole}.", 1))
    return found


def _program(loaded: Loaded, optimizer: Optimizer, recorder: Recorder, work: StepWork) -> Program:
    graded = [leaf for leaf in loaded.leaves.values() if leaf.grad is not None]
    if not graded:
        raise InputError(Problem("lora.target_modules", "no trainable parameter gets a gradient"))
    states = state_bytes(loaded, optimizer, graded)
    count = sum(_size(leaf) for leaf in graded)
    for leaf in graded:
        leaf.grad = None
    return Program(loaded, Loading(loaded), states, recorder, work, count)


def evaluation_peak(spec: RunSpec, model: Model) -> int:
    """Bytes an evaluation forward holds at its peak, above what is resident."""
    loaded = load(spec, model)
    engine = Engine()
    size = spec.model_copy(update={"micro_batch_size": spec.evaluation_batch_size})
    batch = make_batch(engine.recorder, size, model)
    engine.training = False
    with engine.no_grad():
        engine.recorder.enter("evaluation")
        stock_loss(engine, loaded, forward_of(model), batch)
    engine.recorder.enter("end")
    return max(instant.peak_bytes for instant in engine.recorder.instants)


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


def make_batch(recorder: Recorder, spec: RunSpec, model: Model) -> Batch:
    """The inputs of one forward, images included."""
    batch = inputs(recorder, spec.micro_batch_size, spec.sequence_length)
    if not spec.images_per_sample:
        return batch
    make_pixels = getattr(model.family, "pixels", None)
    if make_pixels is None:
        raise UnsupportedError(f"images_per_sample: not modelled for {model.model_type} yet")
    pixels = make_pixels(recorder, model.geometry, spec)
    return Batch(batch.ids, batch.labels, batch.mask, pixels)


def state_bytes(loaded: Loaded, optimizer: Optimizer, leaves: list[Tensor]) -> StateBytes:
    """Optimizer states of the parameters that get a gradient, in the order they are made."""
    device: list[int] = []
    paged = 0
    for leaf in sorted(leaves, key=partial(_group_order, loaded)):
        module = loaded.tree.by_path.get(leaf.name.removesuffix(".weight"))
        is_embedding = module is not None and module.kind == "embedding"
        for state in optimizer.states(leaf, is_embedding):
            nbytes = rounded(max(_elements(state.shape), 1) * state.dtype.itemsize)
            if state.paged:
                paged += nbytes
            else:
                device.append(nbytes)
    return StateBytes(sum(device), paged, tuple(device))


def _group_order(loaded: Loaded, leaf: Tensor) -> tuple[bool, int, str]:
    """Trainer's two parameter groups (norms and biases last, without decay), each in the model's
    order."""
    path, _, name = leaf.name.removesuffix(".weight").partition(".lora_")
    if not name:
        path = leaf.name.rpartition(".")[0]
    module = loaded.tree.by_path[path]
    plain = leaf.name.endswith("bias") or module.kind == "norm"
    return plain, loaded.positions[path], leaf.name


def _size(leaf: Tensor) -> int:
    return _elements(leaf.shape)


def _elements(shape: tuple[Any, ...]) -> int:
    size = 1
    for dimension in shape:
        size *= dimension
    return size
