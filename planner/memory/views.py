"""Views and copies: the same elements in another shape or order, parts of them, several joined."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

from planner.memory.autograd import is_one
from planner.memory.casts import Casts
from planner.memory.tensor import Shape, Tensor
from planner.memory.work import grad_bytes


class Views(Casts):
    """A tensor in another shape: a view where torch makes one, else a copy."""

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
        flips = not (is_one(dims[first]) or is_one(dims[second]))
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
