"""Running an operation on meta while small integer and boolean tensors keep their values.

Modelling code reads a few values (is the mask all ones, which positions hold an image). Token ids,
masks and grids are small, so their values travel beside the meta tensors and every operation on
them alone is also run on the CPU. A value that is read and not known is named in the answer.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch.utils import _pytree as pytree

from planner.errors import UnsupportedError
from probes.dry import fast
from probes.dry.scope import Scope

MAX_ELEMENTS = 1 << 18  # beyond this a value costs more than it can decide
_ATTRIBUTE = "_vramwise_value"
_READ = torch.ops.aten._local_scalar_dense.default
_COPY = torch.ops.aten._to_copy.default
_RANDOM = ("rand", "bernoulli", "normal", "dropout", "multinomial")


class Notes(Protocol):
    """What is told of a run: where the step is, and what the answer has to name as unknown."""

    scope: Scope

    def note_unknown(self, what: str) -> None: ...


def give(tensor: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Attach the CPU `value` to a meta tensor of the same shape."""
    setattr(tensor, _ATTRIBUTE, value)
    return tensor


def constant(data: Any, *, device: Any = None, **kwargs: Any) -> torch.Tensor:
    """`torch.tensor` on meta, which would forget what it was given."""
    known = pytree.tree_map_only(torch.Tensor, lambda x: _known(x).tolist(), data)
    value = torch.tensor(known, **kwargs)
    return give(torch.empty_like(value, device="meta"), value)


def _known(tensor: torch.Tensor) -> torch.Tensor:
    """Its value; zeros where it has none."""
    value = of(tensor) if tensor.device.type == "meta" else tensor
    return torch.zeros(tensor.shape, dtype=tensor.dtype) if value is None else value


def of(tensor: torch.Tensor) -> torch.Tensor | None:
    """The value a meta tensor carries, if any."""
    return tensor.__dict__.get(_ATTRIBUTE) if hasattr(tensor, "__dict__") else None


def run(recorder: Notes, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Run `func`; meta results of operations whose inputs all carry values carry values too."""
    if func is _READ:
        return _read(recorder, args[0])
    if args and func is not _COPY and _unvalued(args[0]):
        result = fast.run(func, args, kwargs)
        return func(*args, **kwargs) if result is None else result
    if func is _COPY:
        return _copied(recorder, func, args, kwargs)
    inputs = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    if not _computable(func, inputs, kwargs):
        return func(*args, **kwargs)
    return _with_value(func, args, kwargs, inputs)


def _unvalued(x: Any) -> bool:
    """A meta tensor of floats without a value: nearly every operation starts with one."""
    return (
        isinstance(x, torch.Tensor) and x.device.type == "meta"
        and _ATTRIBUTE not in x.__dict__ and x.dtype.is_floating_point
    )  # fmt: skip


def _computable(func: Any, inputs: list[torch.Tensor], kwargs: dict[str, Any]) -> bool:
    if inputs:
        if not any(x.device.type == "meta" for x in inputs):
            return False
        if any(x.device.type == "meta" and of(x) is None for x in inputs):
            return False
    elif torch.device(kwargs.get("device") or "cpu").type != "meta":
        return False
    return not any(word in func._schema.name for word in _RANDOM)


def _with_value(func: Any, args: tuple, kwargs: dict[str, Any], inputs: list[torch.Tensor]) -> Any:
    if not inputs and not _small_factory(func, args):
        return func(*args, **kwargs)
    to_cpu = {"device": torch.device("cpu")} if "device" in kwargs else {}
    cpu_args, cpu_kwargs = pytree.tree_map_only(torch.Tensor, _cpu, (args, {**kwargs, **to_cpu}))
    value = func(*cpu_args, **cpu_kwargs)
    if func._schema.is_mutable:
        return func(*args, **kwargs)
    if isinstance(value, (tuple, list)):
        return type(value)(_carried(v, torch.empty_like(v, device="meta")) for v in value)
    if not isinstance(value, torch.Tensor) or value.numel() > MAX_ELEMENTS:
        return func(*args, **kwargs)
    return _carried(value, _on_meta(func, args, kwargs, value))


def _carried(value: torch.Tensor, result: torch.Tensor) -> torch.Tensor:
    """`result` with `value`, unless it is too large to be one that decides a shape."""
    limit = 4096 if value.is_floating_point() else MAX_ELEMENTS
    return give(result, value) if value.numel() <= limit else result


def _small_factory(func: Any, args: tuple) -> bool:
    return func._schema.name in ("aten::arange", "aten::full", "aten::zeros", "aten::ones")


def _on_meta(func: Any, args: tuple, kwargs: dict[str, Any], value: torch.Tensor) -> torch.Tensor:
    try:
        return func(*args, **kwargs)
    except (
        NotImplementedError,
        RuntimeError,
    ):  # the result's shape depends on values: take it from them
        return torch.empty_like(value, device="meta")


def _cpu(tensor: torch.Tensor) -> torch.Tensor:
    value = of(tensor)
    return tensor if value is None else value


def _read(recorder: Notes, tensor: torch.Tensor) -> Any:
    if tensor.device.type != "meta":
        return tensor.item()
    value = of(tensor)
    if value is not None:
        return value.item()
    if tensor.dtype is torch.bool:
        recorder.note_unknown("a truth value that depends on the weights was read; taken as true")
        return True
    if tensor.dtype.is_floating_point:
        return 1.0  # a logged or clipped number: it decides no shape
    raise UnsupportedError(
        "the model reads an integer that depends on the data, so its shapes cannot be known "
        f"(in {recorder.scope.module('forward') or 'the step'})"
    )


def _copied(recorder: Notes, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    source = args[0]
    target = kwargs.get("device")
    if source.device.type == "meta" and target is not None and torch.device(target).type == "cpu":
        return _known(source).to(kwargs.get("dtype") or source.dtype, copy=True)
    result = func(*args, **kwargs)
    value = of(source) if source.device.type == "meta" else source
    if value is not None and value.numel() <= MAX_ELEMENTS and not value.is_floating_point():
        give(result, value.to(result.dtype))
    return result
