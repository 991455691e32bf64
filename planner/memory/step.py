"""One optimizer step of the stock stack: what Trainer, accelerate and torch do, in their order.

transformers/trainer.py (training_step, compute_loss), accelerate/accelerator.py (prepare_model:
autocast around forward, outputs to fp32), torch/nn/utils/clip_grad.py. The step modelled is the
second one: optimizer states exist, gradients are None at its start.
"""

# Annotations stay objects here: named tuples would compile each string at import.
from collections import Counter
from collections.abc import Callable, Iterable
from math import prod
from typing import Any, NamedTuple

from planner.dtypes import F32, INT64, DType
from planner.memory.loaded import COMPUTE, Loaded
from planner.memory.ops import Engine
from planner.memory.optimizer import Optimizer
from planner.memory.storage import BLOCK_BYTES, Recorder
from planner.memory.tensor import Tensor
from planner.memory.work import Work


class Batch(NamedTuple):
    """The inputs of one forward. Images: `pixels` as the family's processor makes them."""

    ids: Tensor
    labels: Tensor
    mask: Tensor
    pixels: Tensor | None = None


# The loss, then what else the model hands back: logits, image_hidden_states, a key-value cache.
Forward = Callable[[Engine, Loaded, Batch], tuple[Any, ...]]


class StepWork(NamedTuple):
    """Work of one micro batch (forward and backward), and of the clipping and optimizer."""

    micro_batch: Work
    optimizer: Work


class InBackward:
    """Steps parameters as their gradients come, for an optimizer that does. `stepped`: those with
    a gradient, by name, with its dtype."""

    def __init__(self, engine: Engine, optimizer: Optimizer) -> None:
        self.engine = engine
        self.optimizer = optimizer
        self.waiting: Tensor | None = None
        self.stepped: dict[str, DType] = {}
        engine.on_leaf_gradient = self._came

    def _came(self, leaf: Tensor) -> None:
        assert leaf.grad is not None
        self.stepped[leaf.name] = leaf.grad.dtype
        if not self.optimizer.waits:
            self.optimizer.leaf_step(self.engine, leaf)
            return
        before, self.waiting = self.waiting, leaf
        if before is not None:
            self.optimizer.leaf_step(self.engine, before)

    def finish(self) -> None:
        """After backward: the last parameter's step."""
        last, self.waiting = self.waiting, None
        if last is not None:
            self.optimizer.leaf_step(self.engine, last)

    def mark(self, leaves: Iterable[Tensor]) -> None:
        """Leaves that had a gradient show one again, for what counts them afterwards."""
        self.engine.on_leaf_gradient = None
        for leaf in leaves:
            if leaf.name in self.stepped:
                leaf.grad = Tensor(None, leaf.shape, self.stepped[leaf.name])


def run_step(
    engine: Engine, loaded: Loaded, forward: Forward, batch: Batch, optimizer: Optimizer
) -> StepWork:
    """Forward, loss, backward, clipping and optimizer of one step, recorded by the engine.

    With accumulation a second micro batch is run: it meets the gradients of the first.
    """
    hook = InBackward(engine, optimizer) if optimizer.in_backward else None
    micro_batch = run_micro_batches(engine, loaded, forward, batch, hook)
    if hook is not None:
        hook.mark(loaded.leaves.values())
    return StepWork(micro_batch, run_optimizer(engine, loaded, optimizer))


def run_micro_batches(
    engine: Engine, loaded: Loaded, forward: Forward, batch: Batch,
    hook: InBackward | None = None,
) -> Work:  # fmt: skip
    """Forward, loss and backward; returns the work of the last micro batch."""
    recorder = engine.recorder
    for _ in range(min(loaded.spec.gradient_accumulation_steps, 2)):
        engine.work = Work()
        recorder.enter("forward")
        loss = stock_loss(engine, loaded, forward, batch)
        recorder.enter("backward")
        engine.backward(loss)
        recorder.mark(("graph", -1))
        if hook is not None:
            hook.finish()
        recorder.module = ""
        del loss
    return engine.work


def run_optimizer(engine: Engine, loaded: Loaded, optimizer: Optimizer) -> Work:
    """Clipping and the optimizer's step; returns their work."""
    recorder = engine.recorder
    engine.work = Work()
    recorder.enter("clipping")
    if not optimizer.in_backward:  # else the gradients are gone
        clip(engine, loaded)
    recorder.enter("optimizer step")
    if not optimizer.in_backward:
        optimizer.step(engine, [leaf for leaf in loaded.leaves.values() if leaf.grad is not None])
    recorder.enter("end")
    return engine.work


def stock_loss(engine: Engine, loaded: Loaded, forward: Forward, batch: Batch) -> Tensor:
    """compute_loss: the wrapped forward under autocast, its outputs turned to fp32, the loss."""
    precision = loaded.spec.precision
    plain = precision == "fp32" or loaded.spec.stack == "lean"  # lean computes in 16-bit weights
    autocast = None if plain else COMPUTE[precision]
    with engine.autocast(autocast):
        loss: Tensor
        loss, *outputs = forward(engine, loaded, batch)
    recorder = engine.recorder
    if autocast is not None:
        with recorder.scope("accelerate (outputs to fp32)"):
            converted = [
                engine.to(output, F32, "float (outputs)")
                for output in outputs
                if isinstance(output, Tensor)
            ]
        del converted
    del outputs
    if precision == "fp16":
        loss = engine.scale(loss, "mul (loss scale)")
    return loss


def clip(engine: Engine, loaded: Loaded) -> None:
    """clip_grad_norm_, foreach: a norm a gradient, then one multiplication in place."""
    if not loaded.spec.max_grad_norm:
        return
    grads = [leaf for leaf in loaded.leaves.values() if leaf.grad is not None]
    with engine.recorder.scope("clip_grad_norm_"):
        norms = engine.new((len(grads), BLOCK_BYTES // 4), F32, "norm")  # a block each
        stacked = engine.new((len(grads),), F32, "stack")
        total = engine.new((), F32, "norm")
    size: Any = sum(times * prod(leaf.shape) * leaf.grad.dtype.itemsize
                    for leaf, times in Counter(grads).items())  # fmt: skip
    engine.count(3 * size, 4)
    del norms, stacked, total


def inputs(recorder: Recorder, batch: Any, length: Any) -> Batch:
    """input_ids, attention_mask and labels of (batch, length) on the device."""

    def make(name: str) -> Tensor:
        storage = recorder.allocate((batch, length), INT64, name, "inputs")
        return Tensor(storage, (batch, length), INT64)

    with recorder.scope("inputs"):
        return Batch(make("input_ids"), make("labels"), make("attention_mask"))
