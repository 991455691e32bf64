"""Casts: x.to(dtype), and those that autocast makes (aten/src/ATen/autocast_mode.h, CUDA lists)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from typing import Any

from planner.dtypes import F32, DType
from planner.memory.autograd import Autograd
from planner.memory.tensor import Tensor


class Casts(Autograd):
    """A tensor in another dtype."""

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

    def lower_all(self, *last_to_first: Tensor | None) -> list[Any]:
        """The casts of a call's arguments, which are made from the last to the first: autocast's
        wrapper (autocast_mode.h, WrapFunction_) casts inside the argument list, and the compiler of
        torch's wheels evaluates that from the right."""
        return [None if x is None else self.lower(x) for x in last_to_first]

    def upper(self, x: Tensor) -> Tensor:
        """Autocast's cast of an argument of an fp32 operation."""
        if self.autocast_dtype is None or not x.dtype.is_16bit:
            return x
        return self.to(x, F32, "autocast")
