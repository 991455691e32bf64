"""bitsandbytes' 4-bit product on CUDA (backends/cuda/ops.py, 0.50): past a few rows the weight is
dequantised in whole, with its block maxima when they are quantised too, then multiplied.

The product is torch's own `linear`, so autocast casts weight and input where they are of another
type than it wants (bf16 weights under fp16), and the result is of that type.
"""

from __future__ import annotations

from math import prod
from typing import Any

import torch

from probes.dry.standins import stands_for

_ABSMAX_8BIT = 7  # place in the schema (bitsandbytes/_ops.py)


@stands_for("bitsandbytes::gemm_4bit")
def gemm_4bit(recorder: Any, func: Any, args: tuple, kwargs: dict[str, Any]) -> torch.Tensor:
    """A [..., K] @ W[N, K]^T -> [..., N]; temporaries: two fp32 of the maxima, W in A's dtype."""
    A, _, shape = args[:3]
    rows = A.numel() // A.shape[-1]
    if recorder.target.gemm_4bit_is_fused(A.dtype, rows, shape[0], shape[1]):
        return A.new_empty((*A.shape[:-1], shape[0]))
    # the dispatcher hands every argument of the schema over by position
    maxima = args[_ABSMAX_8BIT] if len(args) > _ABSMAX_8BIT else kwargs.get("absmax_8bit")
    made = []
    if maxima is not None:
        made = [recorder.begin("dequantize_blockwise", maxima.numel() * 4) for _ in range(2)]
    made.append(recorder.begin("dequantize_4bit", prod(shape) * A.element_size()))
    dtype = recorder.autocast_dtype or A.dtype
    casts = []
    if dtype is not A.dtype:  # the weight first, as autocast's arguments are evaluated
        casts = [
            recorder.begin("autocast", count * dtype.itemsize) for count in (prod(shape), A.numel())
        ]
    output = A.new_empty((*A.shape[:-1], shape[0]), dtype=dtype)
    recorder.track(output, func)
    for event in [*casts, *made]:
        recorder.end(event)
    return output
