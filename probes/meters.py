"""Meters of memory: torch's caching allocator on CUDA, a storage counter on the CPU.

Both answer the same questions, so that one harness runs on both: levels, peaks since the last
reset, a cap that makes an allocation fail, and a mark for timing.
"""

from __future__ import annotations

import gc
import os
import time
import weakref
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


@dataclass(frozen=True, slots=True)
class Levels:
    """Bytes now, and the peaks since the last reset. torch's own words."""

    allocated: int
    peak_allocated: int
    peak_active: int
    reserved: int
    peak_reserved: int
    peak_inactive_split: int
    retries: int
    ooms: int


class Meter(Protocol):
    """What the harness asks of a device."""

    device: torch.device
    total_bytes: int

    def levels(self) -> Levels: ...
    def reset_peaks(self) -> None: ...
    def mark(self) -> Any: ...
    def seconds(self, start: Any, end: Any) -> float: ...
    def synchronize(self) -> None: ...
    def cap(self, cap_bytes: int | None) -> None: ...
    def release(self) -> None: ...


class CudaMeter:
    """torch's caching allocator on one CUDA device."""

    def __init__(self, index: int = 0) -> None:
        self.device = torch.device("cuda", index)
        torch.cuda.set_device(self.device)
        self.total_bytes = torch.cuda.get_device_properties(self.device).total_memory

    def levels(self) -> Levels:
        stats: Any = torch.cuda.memory_stats_as_nested_dict(self.device)
        allocated, reserved = stats["allocated_bytes"]["all"], stats["reserved_bytes"]["all"]
        return Levels(
            allocated=allocated["current"],
            peak_allocated=allocated["peak"],
            peak_active=stats["active_bytes"]["all"]["peak"],
            reserved=reserved["current"],
            peak_reserved=reserved["peak"],
            peak_inactive_split=stats["inactive_split_bytes"]["all"]["peak"],
            retries=stats["num_alloc_retries"],
            ooms=stats["num_ooms"],
        )

    def reset_peaks(self) -> None:
        torch.cuda.reset_peak_memory_stats(self.device)

    def mark(self) -> Any:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, start: Any, end: Any) -> float:
        return float(start.elapsed_time(end)) / 1e3

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.device)

    def cap(self, cap_bytes: int | None) -> None:
        # torch floors fraction x total to bytes; a relative error of 1e-16 x 2^37 is below a byte.
        fraction = 1.0 if cap_bytes is None else min(1.0, cap_bytes / self.total_bytes)
        torch.cuda.set_per_process_memory_fraction(fraction, self.device)

    def release(self) -> None:
        """Back to what a fresh process holds: no cached segments, no library workspaces."""
        gc.collect()
        torch.cuda.synchronize(self.device)
        torch._C._cuda_clearCublasWorkspaces()
        torch.cuda.empty_cache()


class CpuMeter(TorchDispatchMode):
    """Counts the bytes of every storage an operation makes, until it is dropped.

    There is no caching: reserved equals allocated. Active between `start` and `stop`; storages
    that exist before are not counted. Under a cap the operation that passes it raises
    torch.OutOfMemoryError, its result dropped, as a caching allocator would.
    """

    def __init__(self) -> None:
        super().__init__()
        self.device = torch.device("cpu")
        self.total_bytes = 1 << 50
        self._seen: dict[int, weakref.finalize] = {}
        self._allocated = self._peak = self._ooms = 0
        self._cap: int | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_iter(result):
            if isinstance(value, torch.Tensor) and value.device.type == "cpu":
                self._count(value)
        if self._cap is not None and self._allocated > self._cap:
            del result
            self._ooms += 1
            raise torch.OutOfMemoryError(f"{self._allocated} bytes pass the cap of {self._cap}")
        return result

    def _count(self, tensor: torch.Tensor) -> None:
        try:
            storage = tensor.untyped_storage()
        except (NotImplementedError, RuntimeError):
            return
        key, size = storage._cdata, storage.nbytes()
        if key in self._seen or size == 0:
            return
        self._seen[key] = weakref.finalize(storage, self._free, key, size)
        self._allocated += size
        self._peak = max(self._peak, self._allocated)

    def _free(self, key: int, size: int) -> None:
        if self._seen.pop(key, None) is not None:
            self._allocated -= size

    def start(self) -> CpuMeter:
        # transformers loads unquantised tensors in threads, where this mode does not reach.
        os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"
        self.__enter__()
        return self

    def stop(self) -> None:
        self.__exit__(None, None, None)

    def levels(self) -> Levels:
        return Levels(
            allocated=self._allocated,
            peak_allocated=self._peak,
            peak_active=self._peak,
            reserved=self._allocated,
            peak_reserved=self._peak,
            peak_inactive_split=0,
            retries=0,
            ooms=self._ooms,
        )

    def reset_peaks(self) -> None:
        self._peak = self._allocated

    def mark(self) -> Any:
        return time.perf_counter()

    def seconds(self, start: Any, end: Any) -> float:
        return float(end - start)

    def synchronize(self) -> None:
        return None

    def cap(self, cap_bytes: int | None) -> None:
        self._cap = cap_bytes

    def release(self) -> None:
        gc.collect()


def open_meter(cpu: bool) -> Meter:
    """The meter of this process's device; on the CPU it counts from now on."""
    return CpuMeter().start() if cpu else CudaMeter(0)
