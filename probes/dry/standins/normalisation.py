"""Layer norm as CUDA's kernels return it (native/cuda/layer_norm_kernel.cu): mean and rstd in fp32
for 16-bit inputs, the weights' gradients only where they are wanted."""

from __future__ import annotations

from typing import Any

import torch

from probes.dry.standins import stands_for


@stands_for("aten::native_layer_norm")
def layer_norm(recorder: Any, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """(output, mean, rstd): statistics over the last dimensions, kept as ones."""
    x, shape = args[0], args[1]
    kept = (*x.shape[: x.dim() - len(shape)], *(1 for _ in shape))
    dtype = torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else x.dtype
    output = torch.empty_like(x, memory_format=torch.contiguous_format)
    statistics = (x.new_empty(kept, dtype=dtype) for _ in range(2))
    return (output, *statistics)


@stands_for("aten::native_layer_norm_backward")
def layer_norm_backward(recorder: Any, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """(gradient of the input, of the weight, of the bias); the last two are summed over the rows
    in one kernel, without a buffer. A gradient that comes in transposed is copied once the results
    are there (`dY.contiguous()`)."""
    grad, x, _, _, _, weight, bias, wanted = args
    results = (
        torch.empty_like(x, memory_format=torch.contiguous_format) if wanted[0] else None,
        torch.empty_like(weight) if wanted[1] and weight is not None else None,
        torch.empty_like(bias) if wanted[2] and bias is not None else None,
    )
    if not grad.is_contiguous():
        for result in results:
            if result is not None:
                recorder.track(result, func)
        copy = torch.empty_like(grad, memory_format=torch.contiguous_format)
        recorder.track(copy, func)
        del copy
    return results
