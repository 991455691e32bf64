"""bitsandbytes in 8 bits on CUDA (backends/cuda/ops.py and default/ops.py, 0.50), and its optimizer
kernels, which update in place.

Which activation columns are outliers depends on the data: `outlier_columns` says how many. Their
part of the product is made in 16 bits, and their activations (`subA`) are kept for backward by
MatMul8bitLt.
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
    recorder.note_unknown(
        "int8: which columns are outliers depends on the data; counted as spec.int8_outliers says"
    )
    magnitude = recorder.begin(func, A.numel() * A.element_size())
    mask = recorder.begin(func, A.numel())
    recorder.end(magnitude)
    columns = A.new_empty((0,), dtype=torch.int64)
    recorder.end(mask)
    return codes, stats, columns


@stands_for("bitsandbytes::int8_mixed_scaled_mm")
def mixed_scaled_mm(recorder: Any, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """(A @ W^T, the outlier columns of A). With outliers: their weights' codes, in fp32 twice, in
    A's dtype; then `output.addmm(subA, subB)`, which autocast casts, last argument first."""
    A, codes, weights = args[:3]
    count = outlier_columns(recorder, A, weights)
    if not count:
        return _scaled_mm(recorder, func, codes, weights, A.dtype), A.new_empty((0,))
    columns = A.new_empty((A.shape[0], count))
    recorder.track(columns, func)
    elements = weights.shape[0] * count
    taken = recorder.begin(func, elements, "int8")
    scaled, single = (recorder.begin(func, elements * 4, "float32") for _ in range(2))
    recorder.end(scaled)
    if A.dtype is not torch.float32:
        whole, single = single, recorder.begin(func, elements * A.element_size())
        recorder.end(whole)
    recorder.end(taken)
    output = _scaled_mm(recorder, func, codes, weights, A.dtype)
    recorder.track(output, func)
    dtype = recorder.autocast_dtype or A.dtype
    casts = []
    if dtype is not A.dtype:
        sizes = (elements, columns.numel(), output.numel())
        casts = [recorder.begin("autocast", size * dtype.itemsize) for size in sizes]
    result = torch.empty_like(output, dtype=dtype)
    recorder.track(result, func)
    for event in [*casts, single]:
        recorder.end(event)
    return result, columns


def outlier_columns(recorder: Any, A: torch.Tensor, weights: torch.Tensor) -> int:
    """How many columns of A (rows, K) hold a value past the threshold: what the planner expects of
    random weights (N, K), or none where the spec says few."""
    if recorder.outliers is None:
        return 0
    path = recorder.scope.module("forward").removesuffix(".base_layer")
    rows, length = A.numel() // A.shape[-1], recorder.sequence_length
    batch = rows // length if rows % length == 0 else 1
    return int(recorder.outliers.columns(path, A.shape[-1], weights.shape[0], batch, rows // batch))


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
    """In place, without buffers; 8-bit states are searched element by element."""
    recorder.work.optimizer.quantized += sum(
        x.numel() for x in args if isinstance(x, torch.Tensor) and x.dtype is torch.uint8
    )
