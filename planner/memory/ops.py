"""Torch's operations, as far as memory goes: what each allocates, saves, and makes in backward.

Every rule is torch's own: what is saved is read from tools/autograd/derivatives.yaml. Here are the
operations element by element, on top of what all operations stand on: memory and work
(`planner.memory.work`), the graph (`autograd`), casts (`casts`), views and copies (`views`).
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from planner.dtypes import BOOL, F32, DType
from planner.memory.autograd import is_one
from planner.memory.tensor import Shape, Tensor
from planner.memory.views import Views
from planner.memory.work import grad_bytes


class Engine(Views):
    """Runs operations on shadow tensors and records what they allocate."""

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
        need_a, need_b = a.requires_grad, b.requires_grad
        saved = (b if need_a else None, a if need_b else None)
        self.about_to_save(saved)
        self.count(size * (a.dtype.itemsize + b.dtype.itemsize + dtype.itemsize))
        out = self.new(shape, dtype, op)
        out.contiguous = (a if len(a.shape) >= len(b.shape) else b).contiguous

        def backward(g: Tensor) -> tuple[Tensor | None, Tensor | None]:
            grad_b = grad_a = None
            if need_b:
                self.count(3 * size * dtype.itemsize)
                grad_b = self.like(g, dtype, "mul (backward)")
            if need_a:
                self.count(3 * size * dtype.itemsize)
                grad_a = self.like(g, dtype, "mul (backward)")
            return grad_a, grad_b

        return self.record(out, (a, b), saved, backward)

    def pow2(self, x: Tensor) -> Tensor:
        """x.pow(2), an fp32 operation under autocast; saves x."""
        x = self.upper(x)
        self.count(2 * grad_bytes(x))
        out = self.new(x.shape, x.dtype, "pow")
        shape, dtype = x.shape, x.dtype

        def backward(g: Tensor) -> tuple[Tensor]:
            # functions: grad * (exponent * self.pow(exponent - 1))
            self.count(7 * prod(shape) * dtype.itemsize, 3)
            # C++ keeps both temporaries to the end of the expression
            power = self.new(shape, dtype, "pow (backward)")
            scaled = self.new(shape, dtype, "pow (backward)")
            result = self.new(shape, dtype, "pow (backward)")
            del scaled, power
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
        mask = self.new(x.shape, BOOL, "dropout mask")
        out = self.new(x.shape, x.dtype, "dropout")
        shape, dtype = x.shape, x.dtype

        def backward(g: Tensor) -> tuple[Tensor]:
            self.count(prod(shape) * (2 * dtype.itemsize + 1))
            return (self.new(shape, dtype, "dropout (backward)"),)

        return self.record(out, (x,), (mask,), backward)


def promote(a: DType, b: DType) -> DType:
    """torch.promote_types for the floating types met here (bfloat16 with float16 is float32)."""
    if a is b:
        return a
    if a is F32 or b is F32 or (a.is_16bit and b.is_16bit):
        return F32
    return a if a.is_floating else b


def wider(a: Shape, b: Shape) -> Shape:
    """The broadcast shape of two shapes; dimensions are equal or 1."""
    if a is b:
        return a
    if len(a) < len(b):
        a, b = b, a
    offset = len(a) - len(b)
    own = a[offset:]
    for x, y in zip(own, b, strict=True):
        if x is not y and is_one(x):
            return a[:offset] + tuple([y if is_one(x) else x for x, y in zip(own, b, strict=True)])
    return a
