"""What autograd's engine does only where no Python mode is active: sum gradients in place.

torch/csrc/autograd/input_buffer.cpp `accumulate`: the second gradient of a tensor is added into
the first where nothing else refers to the first and it is dense. Under a dispatch mode torch takes
a fresh tensor instead, so the sum is made here as the engine makes it on its own.
"""

from __future__ import annotations

import sys
from typing import Any

import torch

_ADD = torch.ops.aten.add.Tensor
# References to the held gradient inside `__torch_dispatch__` when it is the engine's alone: the
# buffer's, the call's and Python's; a test compares both counts with torch's own decisions.
_ALONE, _STORAGE_ALONE = 4, 2
_ENGINE = "_engine_run_backward"
_WRAPPERS = ("_dynamo/eval_frame.py", "torch/_compile.py")  # torch puts them around modes


def sums_in_place(func: Any, args: tuple) -> bool:
    """Whether this call is the engine adding a gradient into one that only it holds. To be asked
    by `__torch_dispatch__` itself."""
    if func is not _ADD or torch.is_grad_enabled() or len(args) != 2 or not _engine_calls():
        return False
    held, other = args
    if not isinstance(other, torch.Tensor) or held.shape != other.shape:
        return False
    return held._use_count() == _ALONE and _storage_count(held) == _STORAGE_ALONE and _dense(held)


def _engine_calls() -> bool:
    """Whether C++ calls from within `backward()`, no Python function of a node between."""
    frame = sys._getframe(3)
    while frame.f_code.co_filename.endswith(_WRAPPERS) and frame.f_back is not None:
        frame = frame.f_back
    return frame.f_code.co_name == _ENGINE


def _storage_count(tensor: torch.Tensor) -> int:
    return torch._C._storage_Use_Count(tensor.untyped_storage()._cdata)


def _dense(tensor: torch.Tensor) -> bool:
    """`is_non_overlapping_and_dense`: its elements fill a stretch, in some order."""
    expected = 1
    for size, stride in sorted(zip(tensor.shape, tensor.stride(), strict=True), key=lambda p: p[1]):
        if size == 1:
            continue
        if stride != expected:
            return False
        expected *= size
    return True
