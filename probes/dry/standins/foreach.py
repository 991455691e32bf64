"""torch's foreach kernels (native/cuda/ForeachReduceOp.cu): the norm sums in one buffer of fp32."""

from __future__ import annotations

from typing import Any

import torch

from probes.dry.standins import stands_for

_CHUNK = 65536  # kChunkSize


@stands_for("aten::_foreach_norm")
def foreach_norm(recorder: Any, func: Any, args: tuple, kwargs: dict[str, Any]) -> list[Any]:
    """A scalar a tensor; the buffer holds tensors x the most chunks of one."""
    tensors = args[0]
    chunks = max(-(-x.numel() // _CHUNK) for x in tensors)
    recorder.temporary(func, len(tensors) * chunks * 4, dtype="float32")
    return [torch.empty((), dtype=x.dtype, device=x.device) for x in tensors]
