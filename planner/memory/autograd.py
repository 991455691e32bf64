"""Autograd's side of an operation: what is saved, the graph, checkpointing, gradients of leaves.

The graph and its run are in planner.memory.tensor; this is what an operation and a training step
see of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import ref

from planner.dtypes import DType
from planner.errors import InputError, Problem
from planner.memory.storage import Recorder
from planner.memory.tensor import (
    Backward,
    Edge,
    Frame,
    Node,
    Saved,
    Shape,
    StopRecomputation,
    Tensor,
    finish_leaves,
    make_node,
    run_backward,
)
from planner.memory.work import Kernels, grad_bytes

NO_GRADIENT = Problem("lora.target_modules", "no trainable parameter gets a gradient")
# Tells the results of a recomputation from leaves.
_RECOMPUTED = make_node(0, "", (), lambda g: (), None)


class Autograd(Kernels):
    """Records operations, and runs their backward."""

    def __init__(self, recorder: Recorder | None = None) -> None:
        super().__init__(recorder)
        self.grad_enabled = True
        self.cudnn_attention = True  # the card's fused attention: cuDNN's, or flash
        self.training = True  # False in model.eval(): no dropout
        self.autocast_dtype: DType | None = None  # a recomputation runs under its forward's
        self._cast_cache: dict[int, Tensor] = {}
        self._seq = 0
        self._frame: Frame | None = None  # a checkpointed forward is running
        self._refill: tuple[Frame, list[int]] | None = None  # a recomputation is running
        self._refill_kept: list[Any] = []
        self.leaves_waiting: list[Tensor] = []
        self.on_leaf_gradient: Callable[[Tensor], None] | None = None

    def wants_grad(self, *inputs: Tensor | None) -> bool:
        """Whether an operation on `inputs` is recorded."""
        if self.grad_enabled:
            for tensor in inputs:
                if tensor is not None and tensor.requires_grad:
                    return True
        return False

    def record(
        self, output: Tensor, inputs: Sequence[Tensor | None], saved: Sequence[Tensor | None],
        backward: Backward, kept: Any = None,
    ) -> Tensor:  # fmt: skip
        """Make `output` the result of a node on `inputs`.

        `backward(grad)` returns one gradient per input. Does nothing where no input wants one.
        """
        if self._refill is not None:
            return self._record_again(output, inputs, saved, kept)
        if not self.grad_enabled:
            return output
        edges: list[Edge] = []
        wanted = False
        for tensor in inputs:
            if tensor is None or not tensor.requires_grad:
                edges.append(None)
                continue
            wanted, target = True, tensor.node
            if target is None:
                tensor.pending += 1
                edges.append((tensor, tensor.shape, tensor.dtype))
            else:
                edges.append((target, tensor.shape, tensor.dtype))
        if not wanted:
            return output
        output.requires_grad = True
        self._seq += 1
        output.node = node = make_node(self._seq, self.recorder.module, edges, backward, kept)
        if saved:
            self._save(node, saved)
        return output

    def _record_again(
        self, output: Tensor, inputs: Sequence[Tensor | None], saved: Sequence[Tensor | None],
        kept: Any,
    ) -> Tensor:  # fmt: skip
        """`record` in a recomputation: its graph is held, but never run."""
        if self.wants_grad(*inputs):
            output.requires_grad = True
            for tensor in saved:
                if tensor is not None:
                    self._refill_slot(tensor)
            if kept is not None:
                self._refill_kept.append(kept)
            output.node = _RECOMPUTED
        return output

    def about_to_save(self, inputs: Sequence[Tensor | None]) -> None:
        """Inputs are saved before a kernel runs: a recomputation that ends with them stops here."""
        if self._refill is None:
            return
        frame, position = self._refill
        wanted = [tensor for tensor in inputs if tensor is not None]
        if wanted and len(frame.slots) - position[0] == len(wanted):
            for tensor in wanted:
                self._refill_slot(tensor)

    def count_pieces(self, pieces: Any, launches: Any, saved: int) -> None:
        """One operation stands for `pieces` of them, with so many kernels and saved tensors each:
        the host's work for the others."""
        self.work.launches += (pieces - 1) * launches
        if self._refill is not None:
            self.work.hooks += (pieces - 1) * saved

    def _refill_slot(self, tensor: Tensor) -> None:
        """The next of the region's slots has its tensor again; with the last the region ends."""
        assert self._refill is not None
        frame, position = self._refill
        slot = frame.slots[position[0]]()
        if slot is not None:
            slot.fill(tensor.storage)
        position[0] += 1
        self.work.hooks += 1
        if position[0] == len(frame.slots):
            raise StopRecomputation

    def _save(self, node: Node, saved: Sequence[Tensor | None]) -> None:
        held = []
        for tensor in saved:
            if tensor is None:
                continue
            storage = tensor.storage
            if storage is not None and storage.block.category == "temporaries":
                storage.block.category = "saved_activations"
            held.append(storage)
        if self._frame is None:
            node.held = held
            return
        node.slots = [Saved(self._frame) for _ in held]
        self._frame.slots += map(ref, node.slots)

    def checkpoint(self, function: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor:
        """torch.utils.checkpoint, non-reentrant: save the input, recompute in backward."""
        module, autocast = self.recorder.module, self.autocast_dtype

        def run(frame: Frame) -> None:
            outer = (self._refill, self.autocast_dtype, self._cast_cache, self.grad_enabled)
            outer_module = self.recorder.module
            self._refill, self.autocast_dtype = (frame, [0]), autocast
            self._cast_cache, self.grad_enabled = {}, True
            self.recorder.module = module
            try:
                function(hidden)
            except StopRecomputation:
                pass
            finally:
                self._refill, self.autocast_dtype, self._cast_cache, self.grad_enabled = outer
                self._refill_kept.clear()
                self.recorder.module = outer_module

        if not self.grad_enabled:
            return function(hidden)
        outer_frame, self._frame = self._frame, Frame(run)
        try:
            return function(hidden)
        finally:
            self._frame = outer_frame

    @contextmanager
    def no_grad(self) -> Iterator[None]:
        """torch.no_grad()."""
        outer, self.grad_enabled = self.grad_enabled, False
        try:
            yield
        finally:
            self.grad_enabled = outer

    def backward(self, loss: Tensor) -> None:
        """loss.backward(): a gradient of ones, then the graph."""
        if loss.node is None:
            raise InputError(NO_GRADIENT)
        self.backward_with(loss, self.new(loss.shape, loss.dtype, "ones_like"))

    def backward_with(self, output: Tensor, grad: Tensor) -> None:
        """output.backward(grad)."""
        assert output.node is not None, "no parameter wants a gradient"
        run_backward(self, output.node, grad)
        finish_leaves(self)

    def fit_gradient(self, grad: Tensor, shape: Shape, dtype: DType) -> Tensor:
        """engine.cpp, validate_outputs: reduce a broadcast gradient, cast to the input's dtype."""
        if grad.shape is not shape and _is_broadcast(grad.shape, shape):
            self.count(grad_bytes(grad))
            grad = self.new(shape, grad.dtype, "sum (broadcast gradient)")
        if grad.dtype is not dtype:
            self.count(grad_bytes(grad))
            layout = grad.contiguous
            grad = self.new(grad.shape, dtype, "to (gradient)")
            grad.contiguous = layout
        return grad

    def accumulate_leaf(self, leaf: Tensor, grad: Tensor) -> None:
        """The input buffer of a leaf's AccumulateGrad: it runs when every use has sent its part."""
        leaf.pending -= 1
        held = leaf.waiting
        if held is None:
            leaf.waiting = grad
            self.leaves_waiting.append(leaf)
        else:
            self.count(3 * grad_bytes(grad))
            if held.based:  # not in place: see tensor._accumulate
                leaf.waiting = self.new(held.shape, held.dtype, "add (gradients)")
        del held, grad
        if leaf.pending <= 0:
            self.take_leaf(leaf)

    def take_leaf(self, leaf: Tensor) -> None:
        """AccumulateGrad: steal the first gradient, add the later ones in place."""
        grad, leaf.waiting = leaf.waiting, None
        self.leaves_waiting = [other for other in self.leaves_waiting if other is not leaf]
        assert grad is not None
        if leaf.grad is None:
            if not grad.contiguous:  # accumulate_grad.h: a copy in the leaf's memory order
                self.count(2 * grad_bytes(grad))
                grad = self.new(grad.shape, grad.dtype, "clone (gradient)")
            leaf.grad = grad.detach()
            if grad.storage is not None:
                grad.storage.block.category = "gradients"
        else:
            self.count(3 * grad_bytes(grad))
        if self.on_leaf_gradient is not None:
            self.on_leaf_gradient(leaf)


def is_one(size: Any) -> bool:
    return isinstance(size, int) and size == 1  # an array dimension is never broadcast


def _is_broadcast(shape: Shape, target: Shape) -> bool:
    if len(shape) != len(target):
        return len(shape) > len(target)
    for size, wanted in zip(shape, target, strict=True):
        if size is not wanted and is_one(wanted) and not is_one(size):
            return True
    return False
