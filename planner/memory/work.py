"""What an operation asks of the device: memory, and work.

An operation counts its FLOPs, the bytes that it reads and writes, and its kernel launches.
"""

from __future__ import annotations

from math import prod
from typing import Any

from planner.dtypes import F32, DType
from planner.memory.storage import Recorder
from planner.memory.tensor import Shape, Tensor, plain

RIDGE_FLOPS_PER_BYTE = 200  # dense 16-bit peak over bandwidth: 150 to 300 from A100 to B200


class Work:
    """Counters of a step's work, summed over operations.

    hooks: tensors that a checkpointed region saves, each passed through Python when it is packed,
    packed again and unpacked; quantized: elements of 8-bit optimizer states, searched one by one.
    """

    __slots__ = ("flops_16bit", "flops_fp32", "hooks", "launches", "quantized", "traffic_bytes")

    def __init__(self) -> None:
        self.flops_16bit: Any = 0
        self.flops_fp32: Any = 0
        self.traffic_bytes: Any = 0
        self.launches: Any = 0
        self.hooks: Any = 0
        self.quantized: Any = 0

    def counters(self) -> tuple[Any, ...]:
        """All of them, in the order of their names."""
        return tuple(getattr(self, name) for name in self.__slots__)

    def add(self, counters: tuple[Any, ...], times: int) -> None:
        """Add `times` these counters."""
        for name, value in zip(self.__slots__, counters, strict=True):
            setattr(self, name, getattr(self, name) + times * value)


class Kernels:
    """Where operations allocate and count."""

    def __init__(self, recorder: Recorder | None = None) -> None:
        self.recorder = recorder or Recorder()
        self.work = Work()

    def new(self, shape: Shape, dtype: DType, op: str, category: str = "temporaries") -> Tensor:
        """A fresh contiguous tensor."""
        return plain(self.recorder.allocate(shape, dtype, op, category), shape, dtype)

    def like(self, x: Tensor, dtype: DType, op: str) -> Tensor:
        """A fresh tensor of x's shape and memory order, as TensorIterator makes results."""
        out = self.new(x.shape, dtype, op)
        out.contiguous = x.contiguous
        return out

    def count(self, traffic_bytes: Any, launches: float = 1) -> None:
        """Add memory-bound work."""
        work = self.work
        work.traffic_bytes = work.traffic_bytes + traffic_bytes
        work.launches += launches

    def count_matmul(self, flops: Any, traffic_bytes: Any, dtype: DType) -> None:
        """Add a matrix product's work: its FLOPs, and the bytes that its arithmetic cannot hide."""
        work = self.work
        if dtype is F32:
            work.flops_fp32 = work.flops_fp32 + flops
        else:
            work.flops_16bit = work.flops_16bit + flops
        hidden = flops / RIDGE_FLOPS_PER_BYTE
        seen = (traffic_bytes - hidden) * (traffic_bytes > hidden)
        work.traffic_bytes = work.traffic_bytes + seen
        work.launches += 1


def grad_bytes(x: Tensor) -> Any:
    """Bytes of a tensor's elements."""
    return prod(x.shape) * x.dtype.itemsize
