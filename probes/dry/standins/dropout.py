"""Dropout: on CUDA one kernel that keeps a mask of a byte an element (native/cuda/Dropout.cu)."""

from __future__ import annotations

from typing import Any

import torch

from probes.dry.standins import stands_for


@stands_for("aten::native_dropout")
def native_dropout(recorder: Any, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """(output, mask): the mask is bool, both of the input's shape."""
    x = args[0]
    mask = torch.empty_like(x, dtype=torch.bool)
    recorder.track(mask, func)  # the mask first
    return torch.empty_like(x), mask


@stands_for("aten::native_dropout_backward")
def native_dropout_backward(recorder: Any, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """One product with the mask, scaled in the kernel."""
    return torch.empty_like(args[0])
