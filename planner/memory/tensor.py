"""Tensors and autograd, without torch: shapes, dtypes, storages, and what a backward needs.

The engine follows torch/csrc/autograd: nodes run by falling sequence number (engine.cpp), a second
gradient is added in place when nobody else holds the first (input_buffer.cpp), gradients are cast
and reduced to the metadata of the input they belong to (engine.cpp, validate_outputs), a leaf
steals its first gradient (functions/accumulate_grad.h), saved tensors go when their node has run,
attributes of a Python `ctx` only when the graph does.
"""

from __future__ import annotations

import heapq
import sys
from collections.abc import Callable, Sequence
from typing import Any
from weakref import ref

from planner.dtypes import DType
from planner.memory.storage import Storage

Shape = tuple[Any, ...]
Backward = Callable[["Tensor"], Sequence["Tensor | None"]]
Edge = tuple[Any, Shape, DType] | None  # the node or leaf a gradient goes to, and what it must be


class Tensor:
    """A tensor: a view of a storage. `node` made it; a leaf has none, and may want a gradient."""

    __slots__ = (
        "based", "contiguous", "dtype", "grad", "name", "node", "pending", "requires_grad", "shape",
        "storage", "waiting",
    )  # fmt: skip

    def __init__(
        self,
        storage: Storage | None,
        shape: Shape,
        dtype: DType,
        requires_grad: bool = False,
        node: Node | None = None,
        contiguous: bool = True,
        name: str = "",
    ) -> None:
        self.storage = storage
        self.shape = shape
        self.dtype = dtype
        self.requires_grad = requires_grad
        self.node = node
        self.contiguous = contiguous
        self.name = name
        self.grad: Tensor | None = None
        self.based = False  # a view, in torch's sense: its base is held through it
        self.pending = 0  # of a leaf: uses whose gradient has not come yet
        self.waiting: Tensor | None = None  # of a leaf: the sum of those that have

    def view(self, shape: Shape, contiguous: bool | None = None) -> Tensor:
        """The same storage in another shape, outside autograd."""
        layout = self.contiguous if contiguous is None else contiguous
        seen = Tensor(self.storage, shape, self.dtype, contiguous=layout)
        seen.based = True
        return seen

    def detach(self) -> Tensor:
        """The same storage without history."""
        return Tensor(self.storage, self.shape, self.dtype, contiguous=self.contiguous)


class Saved:
    """A saved tensor: held, or (in a checkpointed region) to be recomputed from its frame."""

    __slots__ = ("__weakref__", "frame", "tensor")

    def __init__(self, tensor: Tensor | None, frame: Frame | None) -> None:
        self.tensor = tensor
        self.frame = frame

    def get(self) -> Tensor:
        """The tensor; recomputes its checkpointed region on first use."""
        if self.tensor is None:
            assert self.frame is not None
            self.frame.recompute()
        assert self.tensor is not None
        return self.tensor


class Frame:
    """One checkpointed region: its saved slots in order, and the function that refills them.

    The slots are referred to weakly, as torch's holders are: a graph that is dropped before its
    backward takes its regions with it.
    """

    __slots__ = ("run", "slots")

    def __init__(self, run: Callable[[Frame], None]) -> None:
        self.run = run
        self.slots: list[ref[Saved]] = []

    def recompute(self) -> None:
        """Run the region again; every slot is filled when it returns (early stop included).

        The frame lives on, and its inputs with it, until the last of its slots is released.
        """
        self.run(self)
        self.slots = []


class Node:
    """A step of the backward pass.

    edges: per input, (node or leaf, shape, dtype), or None where no gradient is wanted;
    saved: released after the node ran; kept: a custom function's ctx attributes, released with the
    graph.
    """

    __slots__ = ("apply", "buffer", "edges", "kept", "mark", "module", "queued", "saved", "seq")

    def __init__(
        self,
        seq: int,
        module: str,
        edges: Sequence[Edge],
        saved: Sequence[Saved],
        apply: Backward,
    ) -> None:
        self.seq = seq
        self.module = module
        self.edges = edges
        self.saved = saved
        self.apply = apply
        self.kept: Any = None
        self.buffer: Tensor | None = None
        self.queued = False
        self.mark: tuple[str, int] | None = None  # the first node of a layer's backward


class StopRecomputation(Exception):  # noqa: N818 - the name torch gives it
    """Every saved slot of the frame is filled: the rest of the region need not run."""


def run_backward(engine: Any, root: Node, grad: Tensor) -> None:
    """Run the graph below `root`; `engine` supplies add, cast and reduce (planner.memory.ops)."""
    root.buffer = grad
    del grad
    queue: list[tuple[int, Node]] = [(-root.seq, root)]
    while queue:
        node = heapq.heappop(queue)[1]
        _run_node(engine, node, queue)


def _run_node(engine: Any, node: Node, queue: list[tuple[int, Node]]) -> None:
    recorder = engine.recorder
    if node.mark is not None:
        recorder.mark(node.mark)
    recorder.module = node.module
    grad = node.buffer
    node.buffer = None
    assert grad is not None
    for slot in node.saved:
        slot.get()  # unpacked at the start of a node's apply: a checkpointed region runs here
        del slot
    results = list(node.apply(grad))
    for position, edge in enumerate(node.edges):  # call_function: validate_outputs
        result = results[position]
        if edge is None or result is None:
            continue
        if result.shape is not edge[1] or result.dtype is not edge[2]:
            results[position] = engine.fit_gradient(result, edge[1], edge[2])
    result = None
    del grad
    node.saved = ()  # release_variables
    for position, edge in enumerate(node.edges):
        result = results[position]
        if edge is None or result is None:
            continue
        results[position] = None
        target = edge[0]
        if isinstance(target, Node):
            _accumulate(engine, target, result)
            if not target.queued:
                target.queued = True
                heapq.heappush(queue, (-target.seq, target))
        else:
            engine.accumulate_leaf(target, result)
        result = None


def finish_leaves(engine: Any) -> None:
    """Hand over what leaves still wait with: a use whose graph was dropped gives no gradient."""
    for leaf in list(engine.leaves_waiting):
        leaf.pending = 0
        engine.take_leaf(leaf)


def _accumulate(engine: Any, node: Node, grad: Tensor) -> None:
    """input_buffer.cpp, accumulate: in place where the gradient that came first is nobody else's
    and no view (can_accumulate_inplace: a view's base holds the storage too)."""
    if node.buffer is None:
        node.buffer = grad
        return
    old = node.buffer
    if not old.based and sys.getrefcount(old.storage) <= 2 and sys.getrefcount(old) <= 3:
        return  # old.add_(grad)
    node.buffer = engine.new(old.shape, old.dtype, "add (gradients)")
