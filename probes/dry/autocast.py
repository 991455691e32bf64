"""CUDA's autocast for meta tensors: torch has none for them, so a function mode applies the policy
of ATen/autocast_mode.h, with its cache of casts."""

from __future__ import annotations

import types
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from probes.dry import values
from probes.dry.attention import attend
from probes.dry.kernels import RmsNorm
from probes.dry.policy import FLOAT32, LOWER, PROMOTE, SET_DTYPE

_HAS_TORCH_FUNCTION = (
    "has_torch_function", "has_torch_function_unary", "has_torch_function_variadic",
)  # fmt: skip


class CudaSemantics(TorchFunctionMode):
    """Calls mean what they mean on CUDA: autocast when `dtype` is set, fused softmax, dropout and
    attention always. Entered again for recomputation, where torch leaves the stack of modes empty.
    """

    def __init__(self, recorder: Any) -> None:
        super().__init__()
        self.recorder = recorder
        self._cache: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._running: set[Any] = set()
        self._depth = 0
        self._open: dict[Any, Any] = {}

    @property
    def dtype(self) -> torch.dtype | None:
        """Of the autocast region that runs; stand-ins ask the recorder for it."""
        dtype: torch.dtype | None = self.recorder.autocast_dtype
        return dtype

    @dtype.setter
    def dtype(self, dtype: torch.dtype | None) -> None:
        self.recorder.autocast_dtype = dtype

    def __torch_function__(
        self, func: Any, types_: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name == "dropout":
            return self._dropout(func, *args, **kwargs)
        if func is torch.tensor and str(kwargs.get("device")) == "meta":
            return values.constant(*args, **kwargs)
        if self.dtype is None:
            return self._call(func, name, args, kwargs)
        cast, kwargs = self._autocast(name, args, kwargs)
        held = list(cast)
        del args, cast
        result = self._call(func, name, held, kwargs)
        for place in range(len(held)):  # C++ drops the casts in the reverse of their order
            held[place] = None
        return result

    def _call(self, func: Any, name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        if name == "scaled_dot_product_attention":
            return attend(self.recorder, *args, **kwargs)
        if name == "rms_norm" and type(func) is not types.FunctionType:
            return _rms_norm(*args, **kwargs)
        if name in ("softmax", "log_softmax") and type(func) is not types.FunctionType:
            return _softmax(func, name, *args, **kwargs)
        if isinstance(func, types.FunctionType) and func not in self._running:
            self._running.add(func)
            try:
                with self:
                    return self._opened(func)(*args, **kwargs)
            finally:
                self._running.discard(func)
        return func(*args, **kwargs)

    @contextmanager
    def autocast(self, dtype: torch.dtype | None) -> Iterator[None]:
        """One autocast region: torch's own flags say so too, and the cache ends with it."""
        if dtype is None:
            yield
            return
        before = self.dtype
        self.dtype = dtype
        torch.set_autocast_enabled("cuda", True)
        torch.set_autocast_dtype("cuda", dtype)
        self._depth += 1
        try:
            yield
        finally:
            self.dtype = before
            torch.set_autocast_enabled("cuda", before is not None)
            self._depth -= 1
            if self._depth == 0:
                self._cache.clear()

    @contextmanager
    def without_autocast(self) -> Iterator[None]:
        """A region with autocast off (`torch.autocast(..., enabled=False)`)."""
        before = self.dtype
        self.dtype = None
        torch.set_autocast_enabled("cuda", False)
        try:
            yield
        finally:
            self.dtype = before
            torch.set_autocast_enabled("cuda", before is not None)

    def _autocast(self, name: str, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict]:
        if name in LOWER:
            return self._cast(args, kwargs, self.dtype)
        if name in FLOAT32:
            return self._cast(args, kwargs, torch.float32)
        if name in PROMOTE:
            floats = [x for x in pytree.tree_leaves((args, kwargs)) if _eligible(x)]
            if any(x.dtype is torch.float32 for x in floats):
                return self._cast(args, kwargs, torch.float32)
        elif name in SET_DTYPE and args and _eligible(args[0]) and kwargs.get("dtype") is None:
            if args[0].dtype is not torch.float32:
                kwargs = {**kwargs, "dtype": torch.float32}
        elif name == "cross_entropy_loss" and args[0].dtype is not torch.float32:
            args = (args[0].float(), *args[1:])
        return args, kwargs

    def _cast(self, args: tuple, kwargs: dict, dtype: torch.dtype | None) -> tuple[tuple, dict]:
        """Last argument first: autocast's wrapper casts inside a call's argument list
        (autocast_mode.h `WrapFunction_`), which the compiler of torch's wheels evaluates from the
        right."""
        assert dtype is not None

        def cast(value: Any) -> Any:
            return pytree.tree_map_only(torch.Tensor, lambda x: self._cached(x, dtype), value)

        named = {name: cast(value) for name, value in reversed(kwargs.items())}
        return tuple(reversed([cast(value) for value in reversed(args)])), named

    def _cached(self, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """`cached_cast`: only a trainable fp32 leaf's 16-bit copy is kept until the region ends."""
        if not _eligible(x) or x.dtype is dtype:
            return x
        keep = (
            dtype is self.dtype and x.dtype is torch.float32 and x.requires_grad and x.is_leaf
            and x._base is None
        )  # fmt: skip
        if not keep:
            return x.to(dtype)
        if id(x) not in self._cache:
            self._cache[id(x)] = (x, x.to(dtype))
        return self._cache[id(x)][1]

    def _dropout(
        self, func: Any, x: Any, p: float = 0.5, training: bool = True, *_: Any, **__: Any
    ) -> Any:
        if not training or p == 0 or p == 1:
            return func(x, p, training)
        return torch.ops.aten.native_dropout(x, p, True)[0]

    def _opened(self, func: types.FunctionType) -> Any:
        """`func` without its own detour through the modes, so that what it calls meets this one."""
        if func not in self._open:
            no: dict[str, Any] = {name: lambda *_: False for name in _HAS_TORCH_FUNCTION}
            scope = {**func.__globals__, **no}
            copy = types.FunctionType(
                func.__code__, scope, func.__name__, func.__defaults__, func.__closure__
            )
            copy.__kwdefaults__ = func.__kwdefaults__
            self._open[func] = copy
        return self._open[func]


def _eligible(x: Any) -> bool:
    return isinstance(x, torch.Tensor) and x.is_floating_point() and x.dtype is not torch.float64


def _rms_norm(x: Any, normalized_shape: Any, weight: Any = None, eps: Any = None) -> Any:
    return RmsNorm.apply(x, tuple(normalized_shape), weight)


def _softmax(
    func: Any, name: str, x: Any, dim: Any = None, dtype: Any = None, **kwargs: Any
) -> Any:
    dtype = kwargs.pop("dtype", dtype)
    kwargs.pop("_stacklevel", None)
    if dtype is torch.float32 and x.dtype is torch.float16 and isinstance(dim, int):
        # half_to_float (SoftMax.cpp): no fp32 copy of fp16 scores; bf16 ones are copied
        return getattr(torch.ops.aten, f"_{name}")(x, dim, True)
    return func(x, dim, dtype=dtype, **kwargs)
