"""bitsandbytes in 8 bits on CUDA (backends/cuda/ops.py and default/ops.py, 0.50), and its optimizer
kernels, which update in place.

Which activation columns are outliers depends on the data: none are taken to be.
"""

from __future__ import annotations

from typing import Any

import torch

from probes.dry.standins import stands_for


@stands_for("bitsandbytes::int8_vectorwise_quant")
def vectorwise_quant(recorder: Any, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """(int8 of A's shape, fp32 a row, outlier columns); with a threshold |A| and a mask of it."""
    A = args[0]
    threshold = args[1] if len(args) > 1 else kwargs.get("threshold", 0.0)
    rows = A.numel() // A.shape[-1]
    stats = A.new_empty((rows,), dtype=torch.float32)
    recorder.track(stats, func)
    codes = A.new_empty(A.shape, dtype=torch.int8)
    recorder.track(codes, func)
    if threshold <= 0:
        return codes, stats, None
    recorder.note_unknown("int8: which columns are outliers depends on the data; none are counted")
    magnitude = recorder.begin(func, A.numel() * A.element_size())
    mask = recorder.begin(func, A.numel())
    recorder.end(magnitude)
    columns = A.new_empty((0,), dtype=torch.int64)
    recorder.end(mask)
    return codes, stats, columns


@stands_for("bitsandbytes::int8_mixed_scaled_mm")
def mixed_scaled_mm(recorder: Any, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """(A @ W^T, the outlier columns of A)."""
    A, codes, weights = args[:3]
    return _scaled_mm(recorder, func, codes, weights, A.dtype), A.new_empty((0,))


@stands_for("bitsandbytes::int8_scaled_mm")
def scaled_mm(recorder: Any, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """As above without outliers."""
    return _scaled_mm(recorder, func, args[0], args[1], kwargs.get("dtype") or torch.float16)


def _scaled_mm(
    recorder: Any, func: Any, codes: torch.Tensor, weights: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """int32 product, then fp16, then the wanted dtype, each a tensor of its own."""
    shape = (*codes.shape[:-1], weights.shape[0])
    count = codes.numel() // codes.shape[-1] * weights.shape[0]
    product = recorder.begin(func, count * 4, "int32")
    half = recorder.begin(func, count * 2, "float16") if dtype is not torch.float16 else None
    output = codes.new_empty(shape, dtype=dtype)
    recorder.track(output, func)
    if half is not None:
        recorder.end(half)
    recorder.end(product)
    return output


@stands_for("bitsandbytes::optimizer_update_8bit_blockwise", "bitsandbytes::optimizer_update_32bit")
def optimizer_update(recorder: Any, func: Any, args: tuple, kwargs: dict[str, Any]) -> None:
    """In place, without buffers."""
