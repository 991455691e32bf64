"""Tensors and autograd, without torch: shapes, dtypes, storages, and what a backward needs.

The engine follows torch/csrc/autograd: nodes run by falling sequence number (engine.cpp), a second
gradient is added in place when nobody else holds the first (input_buffer.cpp), gradients are cast
and reduced to the metadata of the input they belong to (engine.cpp, validate_outputs), a leaf
steals its first gradient (functions/accumulate_grad.h), saved tensors go when their node has run,
attributes of a Python `ctx` only when the graph does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from heapq import heappop, heappush
from sys import getrefcount
from typing import Any
from weakref import ref

from planner.dtypes import DType
from planner.memory.storage import Storage, bare

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
        seen = plain(self.storage, shape, self.dtype, layout)
        seen.based = True
        return seen

    def detach(self) -> Tensor:
        """The same storage without history."""
        return plain(self.storage, self.shape, self.dtype, self.contiguous)


def plain(storage: Storage | None, shape: Shape, dtype: DType, contiguous: bool = True) -> Tensor:
    """A tensor outside autograd."""
    tensor = bare(Tensor)
    tensor.storage = storage
    tensor.shape = shape
    tensor.dtype = dtype
    tensor.contiguous = contiguous
    tensor.requires_grad = tensor.based = False
    tensor.node = tensor.grad = tensor.waiting = None
    tensor.name = ""
    tensor.pending = 0
    return tensor


class Saved:
    """A tensor saved in a checkpointed region: recomputed from its frame, then held."""

    __slots__ = ("__weakref__", "filled", "frame", "storage")

    def __init__(self, frame: Frame) -> None:
        self.frame = frame
        self.filled = False
        self.storage: Storage | None = None

    def fill(self, storage: Storage | None) -> None:
        """Hold what was recomputed."""
        self.storage = storage
        self.filled = True

    def unpack(self) -> None:
        """Recompute the checkpointed region on first use."""
        if not self.filled:
            self.frame.recompute()


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
    held, slots: what is saved, in a checkpointed region its slots; released after the node ran;
    kept: a custom function's ctx attributes, released with the graph (None: not a custom function;
    such a one lets its gradient go before what it returns is fitted); mark: of the first node of a
    layer's backward.
    """

    __slots__ = (
        "apply", "buffer", "edges", "held", "kept", "mark", "module", "queued", "seq", "slots",
    )  # fmt: skip

    seq: int
    module: str
    edges: Sequence[Edge]
    held: Sequence[Storage | None]
    slots: Sequence[Saved]
    apply: Backward
    kept: Any
    buffer: Tensor | None
    queued: bool
    mark: tuple[str, int] | None


def make_node(seq: int, module: str, edges: Sequence[Edge], apply: Backward, kept: Any) -> Node:
    """A node that saves nothing yet."""
    node = bare(Node)
    node.seq = seq
    node.module = module
    node.edges = edges
    node.apply = apply
    node.kept = kept
    node.held = node.slots = ()
    node.buffer = node.mark = None
    node.queued = False
    return node


class StopRecomputation(Exception):  # noqa: N818 - the name torch gives it
    """Every saved slot of the frame is filled: the rest of the region need not run."""


def run_backward(engine: Any, root: Node, grad: Tensor) -> None:
    """Run the graph below `root`; `engine` supplies add, cast and reduce (planner.memory.ops)."""
    root.buffer = grad
    del grad
    queue: list[tuple[int, Node]] = [(-root.seq, root)]
    while queue:
        node = heappop(queue)[1]
        _run_node(engine, node, queue)


def _run_node(engine: Any, node: Node, queue: list[tuple[int, Node]]) -> None:
    recorder = engine.recorder
    if node.mark is not None:
        recorder.mark(node.mark)
    recorder.module = node.module
    grad = node.buffer
    node.buffer = None
    assert grad is not None
    for slot in node.slots:
        slot.unpack()  # at the start of a node's apply: a checkpointed region runs here
        del slot
    edges = node.edges
    if len(edges) == 1:  # most have: what follows, without the lists
        edge, result = edges[0], node.apply(grad)[0]
        assert edge is not None
        if node.kept is not None:
            grad = None
        if result is not None and (result.shape is not edge[1] or result.dtype is not edge[2]):
            result = engine.fit_gradient(result, edge[1], edge[2])
        del grad
        node.held = node.slots = ()
        if result is not None:
            _deliver(engine, edge[0], result, queue)
        return
    results = list(node.apply(grad))
    if node.kept is not None:
        grad = None
    for position, edge in enumerate(edges):  # call_function: validate_outputs
        result = results[position]
        if edge is None or result is None:
            continue
        if result.shape is not edge[1] or result.dtype is not edge[2]:
            results[position] = engine.fit_gradient(result, edge[1], edge[2])
    result = None
    del grad
    node.held = node.slots = ()  # release_variables
    for position, edge in enumerate(edges):
        result = results[position]
        if edge is None or result is None:
            continue
        results[position] = None
        _deliver(engine, edge[0], result, queue)
        result = None


def _deliver(engine: Any, target: Any, grad: Tensor, queue: list[tuple[int, Node]]) -> None:
    """A gradient to the node or leaf it is for."""
    if not isinstance(target, Node):
        engine.accumulate_leaf(target, grad)
    elif target.buffer is None:
        target.buffer = grad
        if not target.queued:
            target.queued = True
            heappush(queue, (-target.seq, target))
    else:
        _accumulate(engine, target)


def finish_leaves(engine: Any) -> None:
    """Hand over what leaves still wait with: a use whose graph was dropped gives no gradient."""
    for leaf in list(engine.leaves_waiting):
        leaf.pending = 0
        engine.take_leaf(leaf)


def _accumulate(engine: Any, node: Node) -> None:
    """input_buffer.cpp, accumulate: in place where the gradient that came first is nobody else's
    and no view (can_accumulate_inplace: a view's base holds the storage too)."""
    old = node.buffer
    assert old is not None
    if not old.based and getrefcount(old.storage) <= 2 and getrefcount(old) <= 3:
        return  # old.add_(grad)
    node.buffer = engine.new(old.shape, old.dtype, "add (gradients)")
