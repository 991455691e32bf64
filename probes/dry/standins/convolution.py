"""cuDNN's convolutions: planes are turned to channels-last inside, so the workspace holds input,
weight and output once more.

Read in allocator histories of an H200 (torch 2.11, bf16; up to 147 bytes more), at every shape of
Chameleon's image tokenizer; its first, of three channels, takes none. Patches of an image (stride =
kernel; CLIP's) pad their channels to eight, those that are cut already (Qwen2-VL's) are products.
"""

from __future__ import annotations

from typing import Any

import torch

from probes.dry import values
from probes.dry.standins import stands_for

_VECTOR_CHANNELS = 8  # of the tensor cores' channels-last kernels
_MARGIN_BYTES = 147


@stands_for("aten::convolution")
def convolution(recorder: Any, func: Any, args: tuple, kwargs: dict[str, Any]) -> torch.Tensor:
    """x [B, C, H, W]; other ranks and groups are counted by their results alone, and named."""
    x, weight, stride, groups = args[0], args[1], args[3], args[8]
    result: torch.Tensor = values.run(recorder, func, args, kwargs)
    kernel = tuple(weight.shape[2:])
    patches = kernel == tuple(stride)
    if patches and kernel in (tuple(x.shape[2:]), (1,) * len(kernel)):
        return result
    if weight.dim() != 4 or groups != 1:
        recorder.note_unknown("convolution: cuDNN's workspace is not counted")
        return result
    recorder.track(result, func)
    channels = x.shape[1]
    padded = -(-channels // _VECTOR_CHANNELS) * _VECTOR_CHANNELS
    if padded != channels and not patches:
        return result
    elements = (x.numel() + weight.numel()) // channels * padded + result.numel()
    size = elements * x.element_size() + _MARGIN_BYTES
    recorder.temporary("cuDNN convolution", size)
    return result
