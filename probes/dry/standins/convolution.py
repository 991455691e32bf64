"""cuDNN's convolutions: planes are turned to channels-last inside, so the workspace holds the input
and the output once more.

Measured on an H200 (torch 2.11): 3x3, 128 to 128 channels, 1 x 128 x 512 x 512: 134.5 MB beside
input and output in bf16, 2 x 134.2 MB in fp32. Patches (stride = kernel) are products without it.
"""

from __future__ import annotations

from typing import Any

import torch

from probes.dry import values
from probes.dry.standins import stands_for


@stands_for("aten::convolution")
def convolution(recorder: Any, func: Any, args: tuple, kwargs: dict[str, Any]) -> torch.Tensor:
    """x [B, C, H, W]; other ranks and groups are counted by their results alone, and named."""
    x, weight, stride, groups = args[0], args[1], args[3], args[8]
    result: torch.Tensor = values.run(recorder, func, args, kwargs)
    kernel = tuple(weight.shape[2:])
    if kernel == tuple(stride):
        return result
    if weight.dim() != 4 or groups != 1:
        recorder.note_unknown("convolution: cuDNN's workspace is not counted")
        return result
    recorder.track(result, func)
    size = (x.numel() + result.numel()) * x.element_size()
    recorder.temporary("cuDNN convolution", size)
    return result
