"""CUDA's index kernels and the buffers they sort and sum in."""

from __future__ import annotations

from typing import Any

import torch

from planner.errors import UnsupportedError
from probes.dry import values
from probes.dry.standins import stands_for

_SORTED_ROWS = 3072  # embedding_dense_backward_cuda: fewer indices need no sort
_ROWS_A_THREAD = 10  # NROWS_PER_THREAD, EmbeddingBackwardKernel.cu


@stands_for("aten::masked_scatter_")
def masked_scatter_(recorder: Any, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """IndexKernel.cpp `masked_scatter_cuda_impl`: the mask's prefix sum in int64, and for it the
    mask at full shape."""
    x, mask = args[:2]
    _scatter_buffers(recorder, func, x, mask)
    return x


@stands_for("aten::masked_scatter")
def masked_scatter(recorder: Any, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Out of place: a clone first."""
    x, mask = args[:2]
    result = torch.empty_like(x)
    recorder.track(result, func)
    _scatter_buffers(recorder, func, x, mask)
    return result


@stands_for("aten::masked_scatter_backward")
def masked_scatter_backward(recorder: Any, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """The selected gradients: the mask at full shape until the positions are there (int64, one a
    dimension and element), then the values."""
    grad, mask, sizes = args[:3]
    count = torch.Size(sizes).numel()
    full = _full_mask(recorder, func, grad, mask)
    positions = recorder.begin(func, count * grad.dim() * 8, "int64")
    if full is not None:
        recorder.end(full)
    result = grad.new_empty(sizes)
    recorder.track(result, func)
    recorder.end(positions)
    return result


@stands_for("aten::embedding_dense_backward")
def embedding_dense_backward(recorder: Any, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Past 3072 indices they are sorted, and rows are summed in fp32 by partial segments
    (Embedding.cu, EmbeddingBackwardKernel.cu)."""
    grad, indices, rows = args[:3]
    count, width = indices.numel(), grad.shape[-1]
    if count <= _SORTED_ROWS:
        return grad.new_empty((rows, width))
    made = [recorder.begin(func, count * 8, "int64") for _ in range(2)]
    result = grad.new_empty((rows, width))
    recorder.track(result, func)
    segments = min(count, rows)
    partial = count // _ROWS_A_THREAD + segments
    made.append(recorder.begin(func, count * 8, "int64"))
    made.append(recorder.begin(func, partial * 8, "int64"))
    made.append(recorder.begin(func, partial * width * 4, "float32"))
    for event in reversed(made):
        recorder.end(event)
    return result


@stands_for("aten::index")
def index(recorder: Any, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """A mask becomes positions first (`nonzero`), so its values must be known."""
    x, indices = args[0], args[1]
    if x.device.type != "meta" or not any(_is_mask(i) for i in indices):
        return values.run(recorder, func, args, kwargs)
    positions: list[torch.Tensor | None] = []
    for i in indices:
        if not _is_mask(i):
            positions.append(i)
            continue
        value = values.of(i)
        if value is None:
            raise UnsupportedError("a tensor is indexed by a mask that depends on the weights")
        found = torch.empty((value.dim(), int(value.sum())), dtype=torch.int64, device="meta")
        recorder.track(found, "nonzero")
        positions += found.unbind(0)
    return func(x, positions)


def _is_mask(i: Any) -> bool:
    return isinstance(i, torch.Tensor) and i.dtype is torch.bool and i.device.type == "meta"


def _scatter_buffers(recorder: Any, func: Any, x: torch.Tensor, mask: torch.Tensor) -> None:
    sums = recorder.begin(func, x.numel() * 8, "int64")
    full = _full_mask(recorder, func, x, mask)
    if full is not None:
        recorder.end(full)
    recorder.end(sums)


def _full_mask(recorder: Any, func: Any, x: torch.Tensor, mask: torch.Tensor) -> Any:
    """A buffer for the mask at x's shape, where it is not that already."""
    if mask.shape == x.shape and mask.is_contiguous():
        return None
    return recorder.begin(func, x.numel(), "bool")
