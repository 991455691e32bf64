"""Torch's operations, as far as memory goes: what each allocates, saves, and makes in backward.

Every rule is torch's own: what is saved is read from tools/autograd/derivatives.yaml, what
autocast casts from aten/src/ATen/autocast_mode.h (CUDA lists). An operation also counts its work:
FLOPs, bytes read and written, kernel launches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from math import prod
from typing import Any
from weakref import ref

from planner.dtypes import DType
from planner.memory.storage import Recorder
from planner.memory.tensor import (
    Backward,
    Frame,
    Node,
    Saved,
    Shape,
    StopRecomputation,
    Tensor,
    finish_leaves,
    run_backward,
)

RIDGE_FLOPS_PER_BYTE = 200  # dense 16-bit peak over bandwidth: 150 to 300 from A100 to B200
F32 = DType.FLOAT32
BOOL = DType.BOOL


class Work:
    """Counters of a step's work, summed over operations."""

    __slots__ = ("flops_16bit", "flops_fp32", "launches", "traffic_bytes")

    def __init__(self) -> None:
        self.flops_16bit: Any = 0
        self.flops_fp32: Any = 0
        self.traffic_bytes: Any = 0
        self.launches: Any = 0

    def counters(self) -> tuple[Any, ...]:
        """All of them, in the order of their names."""
        return tuple(getattr(self, name) for name in self.__slots__)

    def add(self, counters: tuple[Any, ...], times: int) -> None:
        """Add `times` these counters."""
        for name, value in zip(self.__slots__, counters, strict=True):
            setattr(self, name, getattr(self, name) + times * value)


class Engine:
    """Runs operations on shadow tensors and records what they allocate."""

    def __init__(self, recorder: Recorder | None = None) -> None:
        self.recorder = recorder or Recorder()
        self.work = Work()
        self.autocast_dtype: DType | None = None
        self.grad_enabled = True
        self.training = True  # False in model.eval(): no dropout
        self._cast_cache: dict[int, Tensor] = {}
        self._seq = 0
        self._frame: Frame | None = None  # a checkpointed forward is running
        self._refill: tuple[Frame, list[int]] | None = None  # a recomputation is running
        self._refill_kept: list[Any] = []
        self.leaves_waiting: list[Tensor] = []
        self.on_leaf_gradient: Callable[[Tensor], None] | None = None

    # -- allocation and graph ------------------------------------------------------------------

    def new(self, shape: Shape, dtype: DType, op: str, category: str = "temporaries") -> Tensor:
        """A fresh contiguous tensor."""
        return Tensor(self.recorder.allocate(shape, dtype, op, category), shape, dtype)

    def like(self, x: Tensor, dtype: DType, op: str) -> Tensor:
        """A fresh tensor of x's shape and memory order, as TensorIterator makes results."""
        out = self.new(x.shape, dtype, op)
        out.contiguous = x.contiguous
        return out

    def count(self, traffic_bytes: Any, launches: float = 1) -> None:
        """Add memory-bound work."""
        work = self.work
        work.traffic_bytes = work.traffic_bytes + traffic_bytes
        work.launches += launches

    def count_matmul(self, flops: Any, traffic_bytes: Any, dtype: DType) -> None:
        """Add a matrix product's work: its FLOPs, and the bytes that its arithmetic cannot hide."""
        work = self.work
        if dtype is F32:
            work.flops_fp32 = work.flops_fp32 + flops
        else:
            work.flops_16bit = work.flops_16bit + flops
        hidden = flops / RIDGE_FLOPS_PER_BYTE
        seen = (traffic_bytes - hidden) * (traffic_bytes > hidden)
        work.traffic_bytes = work.traffic_bytes + seen
        work.launches += 1

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

        `backward(grad)` returns one gradient per input; it reads `saved` through the node, see
        `saved_tensors`. Does nothing where no input wants a gradient.
        """
        if not self.wants_grad(*inputs):
            return output
        output.requires_grad = True
        slots = tuple(self._save(tensor) for tensor in saved if tensor is not None)
        if self._refill is not None:  # the graph of a recomputation is held, but never run
            if kept is not None:
                self._refill_kept.append(kept)
            output.node = _RECOMPUTED
            return output
        edges = tuple(
            ((t.node or t), t.shape, t.dtype) if t is not None and t.requires_grad else None
            for t in inputs
        )
        for t in inputs:
            if t is not None and t.requires_grad and t.node is None:
                t.pending += 1
        self._seq += 1
        node = Node(self._seq, self.recorder.module, edges, slots, backward)
        node.kept = kept
        output.node = node
        return output

    def about_to_save(self, inputs: Sequence[Tensor | None]) -> None:
        """Inputs are saved before a kernel runs: a recomputation that ends with them stops here."""
        if self._refill is None:
            return
        frame, position = self._refill
        wanted = [tensor for tensor in inputs if tensor is not None]
        if wanted and len(frame.slots) - position[0] == len(wanted):
            for tensor in wanted:
                self._save(tensor)

    def _save(self, tensor: Tensor) -> Saved:
        held = tensor.detach()
        if self._refill is not None:
            frame, position = self._refill
            slot = frame.slots[position[0]]()
            if slot is not None:
                slot.tensor = held
            position[0] += 1
            if position[0] == len(frame.slots):
                raise StopRecomputation
            return Saved(held, None)
        if tensor.storage is not None and tensor.storage.block.category == "temporaries":
            tensor.storage.block.category = "saved_activations"
        if self._frame is None:
            return Saved(held, None)
        slot = Saved(None, self._frame)
        self._frame.slots.append(ref(slot))
        return slot

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

    @contextmanager
    def autocast(self, dtype: DType | None) -> Iterator[None]:
        """torch.autocast("cuda", dtype); None disables. Leaving the outermost clears the cache."""
        outer, outer_cache = self.autocast_dtype, self._cast_cache
        self.autocast_dtype = dtype
        if outer is None and dtype is not None:
            self._cast_cache = {}
        try:
            yield
        finally:
            self.autocast_dtype, self._cast_cache = outer, outer_cache

    def backward(self, loss: Tensor) -> None:
        """loss.backward(): a gradient of ones, then the graph."""
        assert loss.node is not None, "no parameter wants a gradient"
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

    # -- casts ---------------------------------------------------------------------------------

    def to(self, x: Tensor, dtype: DType, op: str = "to") -> Tensor:
        """x.to(dtype); the same tensor where nothing changes."""
        if x.dtype is dtype:
            return x
        self.count(prod(x.shape) * (x.dtype.itemsize + dtype.itemsize))
        out = self.new(x.shape, dtype, op)
        out.contiguous = x.contiguous
        source = x.dtype
        return self.record(out, (x,), (), lambda g: (self._cast_raw(g, source),))

    def _cast_raw(self, g: Tensor, dtype: DType) -> Tensor:
        if g.dtype is dtype:
            return g
        self.count(prod(g.shape) * (g.dtype.itemsize + dtype.itemsize))
        return self.like(g, dtype, "to (backward)")

    def lower(self, x: Tensor) -> Tensor:
        """Autocast's cast of an argument of a lower-precision operation, cached for leaves."""
        target = self.autocast_dtype
        if target is None or x.dtype is target or not x.dtype.is_floating:
            return x
        is_leaf = x.requires_grad and x.node is None and x.dtype is F32
        if is_leaf and id(x) in self._cast_cache:
            return self._cast_cache[id(x)]
        cast = self.to(x, target, "autocast")
        if is_leaf:
            self._cast_cache[id(x)] = cast
        return cast

    def upper(self, x: Tensor) -> Tensor:
        """Autocast's cast of an argument of an fp32 operation."""
        if self.autocast_dtype is None or not x.dtype.is_16bit:
            return x
        return self.to(x, F32, "autocast")

    # -- views ---------------------------------------------------------------------------------

    def reshape(self, x: Tensor, shape: Shape) -> Tensor:
        """x.reshape(shape): a view when contiguous, else a copy."""
        if not x.contiguous:
            x = self.clone(x, "reshape")
        return self.alias(x, shape, True)

    def alias(self, x: Tensor, shape: Shape, contiguous: bool, reshapes: bool = True) -> Tensor:
        """A differentiable view: view, unsqueeze, expand without broadcast. Its backward is
        grad.reshape(source): a copy of a gradient in another memory order."""
        out = x.view(shape, contiguous)
        source = x.shape

        def backward(g: Tensor) -> tuple[Tensor]:
            if reshapes and not g.contiguous:
                self.count(2 * grad_bytes(g))
                g = self.new(g.shape, g.dtype, "reshape (backward)")
            return (g.view(source),)

        return self.record(out, (x,), (), backward)

    def transpose(self, x: Tensor, first: int, second: int) -> Tensor:
        """x.transpose(first, second): the contiguous flag flips with the layout."""
        dims = list(x.shape)
        dims[first], dims[second] = dims[second], dims[first]
        flips = not (_is_one(dims[first]) or _is_one(dims[second]))
        out, source = x.view(tuple(dims), x.contiguous is not flips), x.shape
        return self.record(out, (x,), (), lambda g: (g.view(source, g.contiguous is not flips),))

    def clone(self, x: Tensor, op: str = "clone") -> Tensor:
        """x.clone() or x.contiguous() of a non-contiguous x."""
        self.count(2 * grad_bytes(x))
        out = self.new(x.shape, x.dtype, op)
        return self.record(out, (x,), (), lambda g: (g,))

    def contiguous(self, x: Tensor) -> Tensor:
        """x.contiguous()."""
        return x if x.contiguous else self.clone(x, "contiguous")

    def slice_last(self, x: Tensor, size: Any) -> Tensor:
        """x[..., a:b] of the last dimension: a view; its backward fills zeros of the whole."""
        out = x.view((*x.shape[:-1], size))
        whole, dtype = x.shape, x.dtype

        def backward(g: Tensor) -> tuple[Tensor]:
            self.count(prod(whole) * dtype.itemsize * 2, 2)
            return (self.new(whole, dtype, "slice_backward"),)

        return self.record(out, (x,), (), backward)

    def chunk(self, x: Tensor, parts: int) -> list[Tensor]:
        """x.chunk(parts, -1): views; their gradients are put together by one cat."""
        shape, dtype = x.shape, x.dtype
        size = shape[-1] // parts
        grads: list[Tensor] = []

        def join(_: Tensor) -> tuple[Tensor]:
            self.count(2 * prod(shape) * dtype.itemsize)
            whole = self.new(shape, dtype, "cat (backward)")
            grads.clear()
            return (whole,)

        def collect(g: Tensor) -> tuple[Tensor | None]:
            grads.append(g)
            return (token if len(grads) == parts else None,)

        base = self.record(x.view(shape), (x,), (), join)
        token = Tensor(None, shape, dtype)
        return [
            self.record(x.view((*shape[:-1], size)), (base,), (), collect) for _ in range(parts)
        ]

    def cat(self, parts: Sequence[Tensor], shape: Shape) -> Tensor:
        """torch.cat: one copy; backward gives views."""
        dtype = parts[0].dtype
        self.count(2 * prod(shape) * dtype.itemsize)
        out = self.new(shape, dtype, "cat")
        shapes = [part.shape for part in parts]
        return self.record(out, parts, (), lambda g: tuple(g.view(s, False) for s in shapes))

    # -- elementwise ---------------------------------------------------------------------------

    def elementwise(
        self, x: Tensor, op: str, saved: Sequence[Tensor], temporaries: int = 0,
        launches_backward: int = 1,
    ) -> Tensor:  # fmt: skip
        """A unary operation whose backward makes `temporaries` extra tensors, then the gradient."""
        self.count(2 * grad_bytes(x))
        out = self.new(x.shape, x.dtype, op)
        out.contiguous = x.contiguous
        shape, dtype = x.shape, x.dtype
        name = f"{op} (backward)"

        def backward(g: Tensor) -> tuple[Tensor]:
            self.count((2 + 2 * temporaries) * prod(shape) * dtype.itemsize, launches_backward)
            held = [self.new(shape, dtype, name) for _ in range(temporaries)]
            result = self.like(g, dtype, name)
            del held
            return (result,)

        return self.record(out, (x,), tuple(saved), backward)

    def scale(self, x: Tensor, op: str = "mul") -> Tensor:
        """x times (or plus) a Python number: mul makes a new gradient."""
        return self.elementwise(x, op, ())

    def add_scalar(self, x: Tensor) -> Tensor:
        """x + number: the gradient passes."""
        self.count(2 * grad_bytes(x))
        out = self.new(x.shape, x.dtype, "add")
        return self.record(out, (x,), (), lambda g: (g,))

    def add(self, a: Tensor, b: Tensor, op: str = "add") -> Tensor:
        """a + b with broadcasting and promotion; nothing is saved."""
        dtype, shape = promote(a.dtype, b.dtype), wider(a.shape, b.shape)
        self.count(prod(shape) * (a.dtype.itemsize + b.dtype.itemsize + dtype.itemsize))
        out = self.new(shape, dtype, op)
        out.contiguous = a.contiguous
        return self.record(out, (a, b), (), lambda g: (g, g))

    def mul(self, a: Tensor, b: Tensor, op: str = "mul") -> Tensor:
        """a * b: saves each factor the other's gradient needs."""
        dtype, shape = promote(a.dtype, b.dtype), wider(a.shape, b.shape)
        size = prod(shape)
        self.count(size * (a.dtype.itemsize + b.dtype.itemsize + dtype.itemsize))
        out = self.new(shape, dtype, op)
        out.contiguous = (a if len(a.shape) >= len(b.shape) else b).contiguous
        need_a, need_b = a.requires_grad, b.requires_grad

        def backward(g: Tensor) -> tuple[Tensor | None, Tensor | None]:
            grad_b = grad_a = None
            if need_b:
                self.count(3 * size * dtype.itemsize)
                grad_b = self.like(g, dtype, "mul (backward)")
            if need_a:
                self.count(3 * size * dtype.itemsize)
                grad_a = self.like(g, dtype, "mul (backward)")
            return grad_a, grad_b

        return self.record(out, (a, b), (b if need_a else None, a if need_b else None), backward)

    def pow2(self, x: Tensor) -> Tensor:
        """x.pow(2), an fp32 operation under autocast; saves x."""
        x = self.upper(x)
        self.count(2 * grad_bytes(x))
        out = self.new(x.shape, x.dtype, "pow")
        shape, dtype = x.shape, x.dtype

        def backward(g: Tensor) -> tuple[Tensor]:
            # functions: grad * (exponent * self.pow(exponent - 1))
            self.count(7 * prod(shape) * dtype.itemsize, 3)
            power = self.new(shape, dtype, "pow (backward)")
            scaled = self.new(shape, dtype, "pow (backward)")
            del power
            result = self.new(shape, dtype, "pow (backward)")
            del scaled
            return (result,)

        return self.record(out, (x,), (x,), backward)

    def mean_last(self, x: Tensor) -> Tensor:
        """x.mean(-1, keepdim=True)."""
        self.count(grad_bytes(x))
        out = self.new((*x.shape[:-1], 1), x.dtype, "mean")
        shape, dtype = x.shape, x.dtype

        def backward(g: Tensor) -> tuple[Tensor]:
            self.count(prod(shape) * dtype.itemsize)
            return (self.new(shape, dtype, "mean (backward)"),)

        return self.record(out, (x,), (), backward)

    def rsqrt(self, x: Tensor) -> Tensor:
        """torch.rsqrt, an fp32 operation under autocast; saves its result."""
        x = self.upper(x)
        self.count(2 * grad_bytes(x))
        out = self.new(x.shape, x.dtype, "rsqrt")
        shape, dtype = x.shape, x.dtype

        def backward(g: Tensor) -> tuple[Tensor]:
            # derivatives.yaml: -0.5 * grad * result.pow(3)
            self.count(7 * prod(shape) * dtype.itemsize, 3)
            scaled, cube = (self.new(shape, dtype, "rsqrt (backward)") for _ in range(2))
            result = self.new(shape, dtype, "rsqrt (backward)")
            del scaled, cube
            return (result,)

        return self.record(out, (x,), (out,), backward)

    def neg(self, x: Tensor) -> Tensor:
        """-x."""
        return self.elementwise(x, "neg", ())

    def activation(self, x: Tensor, op: str) -> Tensor:
        """silu, gelu, quick-gelu's sigmoid...: saves its input, one fused backward kernel."""
        return self.elementwise(x, op, (x,))

    def tanh(self, x: Tensor) -> Tensor:
        """torch.tanh: saves its result."""
        self.count(2 * grad_bytes(x))
        out = self.new(x.shape, x.dtype, "tanh")
        shape, dtype = x.shape, x.dtype
        return self.record(
            out, (x,), (out,), lambda g: (self.new(shape, dtype, "tanh (backward)"),)
        )

    def dropout(self, x: Tensor, probability: float) -> Tensor:
        """F.dropout in training on CUDA: native_dropout, which saves a byte mask."""
        if probability == 0 or not self.training:
            return x
        self.count(2 * grad_bytes(x) + prod(x.shape))
        out = self.new(x.shape, x.dtype, "dropout")
        mask = self.new(x.shape, BOOL, "dropout mask")
        shape, dtype = x.shape, x.dtype

        def backward(g: Tensor) -> tuple[Tensor]:
            self.count(prod(shape) * (2 * dtype.itemsize + 1))
            return (self.new(shape, dtype, "dropout (backward)"),)

        return self.record(out, (x,), (mask,), backward)


_RECOMPUTED = Node(0, "", (), (), lambda g: ())  # tells results of a recomputation from leaves


def grad_bytes(x: Tensor) -> Any:
    """Bytes of a tensor's elements."""
    return prod(x.shape) * x.dtype.itemsize


def promote(a: DType, b: DType) -> DType:
    """torch.promote_types for the floating types met here (bfloat16 with float16 is float32)."""
    if a is b:
        return a
    if a is F32 or b is F32 or (a.is_16bit and b.is_16bit):
        return F32
    return a if a.is_floating else b


def wider(a: Shape, b: Shape) -> Shape:
    """The broadcast shape of two shapes; dimensions are equal or 1."""
    if len(a) < len(b):
        a, b = b, a
    offset = len(a) - len(b)
    return a[:offset] + tuple(y if _is_one(x) else x for x, y in zip(a[offset:], b, strict=True))


def _is_one(size: Any) -> bool:
    return isinstance(size, int) and size == 1  # an array dimension is never broadcast


def _is_broadcast(shape: Shape, target: Shape) -> bool:
    if len(shape) != len(target):
        return len(shape) > len(target)
    return any(_is_one(t) and not _is_one(s) for s, t in zip(shape, target, strict=True))
