"""Softmax's backward on CUDA (native/cuda/SoftMax.cu): the gradient times the output is a tensor of
its own before the kernel runs. Log-softmax has none."""

from __future__ import annotations

from typing import Any

import torch

from probes.dry.standins import stands_for


@stands_for("aten::_softmax_backward_data")
def softmax_backward(recorder: Any, func: Any, args: tuple, kwargs: dict[str, Any]) -> torch.Tensor:
    """The result in the input's dtype is there first."""
    grad, output, _, dtype = args
    result = torch.empty_like(grad, dtype=dtype)
    recorder.track(result, func)
    product = torch.empty_like(grad, dtype=torch.promote_types(grad.dtype, output.dtype))
    recorder.track(product, func)
    del product
    return result
