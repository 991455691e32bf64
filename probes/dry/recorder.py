"""The dispatch mode that counts storages: each new untyped storage on meta is an allocation, its
finalizer is the release, so lifetimes are Python's and autograd's own."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from planner.memory.outliers import OutlierModel
from probes.dry import engine, standins, values
from probes.dry.events import Category, Event, Phase
from probes.dry.scope import Scope
from probes.dry.target import Target
from probes.dry.work import Counter

ROUNDING_BYTES = 512  # kMinBlockSize of c10/cuda/CUDACachingAllocator.cpp
LT_WORKSPACE_BYTES = 1 << 20  # measured on an H200, torch 2.11: a first addmm with a bias
_aten = torch.ops.aten
MATRIX_PRODUCTS = frozenset(
    (_aten.mm.default, _aten.addmm.default, _aten.bmm.default, _aten.baddbmm.default)
)

_COMPOSITES = frozenset((_aten.linear.default, _aten.matmul.default))


class Recorder(TorchDispatchMode):
    """Active while the traced program runs. `events` grows; `load` is cut off by `take`.

    Only storages on meta are device memory: a CPU tensor in the traced program is host memory.
    """

    def __init__(self, scope: Scope) -> None:
        super().__init__()
        self.scope = scope
        self.target = Target()
        self.events: list[Event] = []
        self.phase: Phase = "load"
        self.step = 0
        self.section = 0
        self.category: Category | None = None
        self.unknown: dict[str, None] = {}
        self._live: dict[int, tuple[int, Event, Any]] = {}
        self.paged_bytes = 0
        self.autocast_dtype: torch.dtype | None = None  # of the region that runs
        self.outliers: OutlierModel | None = None  # of 8 bits, where inputs hold any
        self.sequence_length = 1
        self.work = Counter()
        self._count = 0
        self._handles: set[tuple[str, str]] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is _aten.add.Tensor and engine.sums_in_place(func, args):
            return args[0]
        if func in _COMPOSITES:  # met whole below autograd, inside a custom operation
            with self:
                return func.decompose(*args, **kwargs)
        standin = standins.lookup(func)
        if standin is not None:
            result = standin(self, func, args, kwargs)
        else:
            doubt = standins.doubt(func)
            if doubt is not None:
                self.note_unknown(doubt)
            result = values.run(self, func, args, kwargs)
        self._note(func, result)
        if func in MATRIX_PRODUCTS:
            self._workspaces(func, args)
        self.work.count(self.phase, func, args, kwargs, result)
        return result

    def _note(self, func: Any, result: Any) -> None:
        if isinstance(result, torch.Tensor):
            if result.device.type == "meta":
                self.track(result, func)
        elif isinstance(result, (list, tuple)):
            for item in result:
                self._note(func, item)

    def track(self, tensor: torch.Tensor, func: Any = None) -> None:
        """Count the tensor's storage unless it is counted already."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._live:
            return
        size_bytes = -(-storage.nbytes() // ROUNDING_BYTES) * ROUNDING_BYTES
        if size_bytes == 0:
            return
        event = self._event("alloc", size_bytes, func, tensor)
        reference = weakref.ref(storage, partial(self._gone, key))
        self._live[key] = (event.storage_id, event, reference)
        self.events.append(event)

    def temporary(self, func: Any, *sizes_bytes: int, dtype: str = "uint8") -> None:
        """Buffers that a kernel makes and drops before its caller sees anything: alloc and free."""
        made = [self.begin(func, size, dtype) for size in sizes_bytes if size > 0]
        for event in reversed(made):
            self.end(event)

    def begin(self, func: Any, size_bytes: int, dtype: str = "uint8") -> Event:
        """Allocate a buffer that has no tensor of its own; `end` frees it."""
        rounded = -(-size_bytes // ROUNDING_BYTES) * ROUNDING_BYTES
        event = self._event("alloc", rounded, func, None)
        event.shape, event.dtype = (size_bytes,), dtype
        self.events.append(event)
        return event

    def end(self, event: Event) -> None:
        self.events.append(self._release(event))

    def label(self, tensor: torch.Tensor, category: Category) -> None:
        """Fix the category of a tensor's storage."""
        entry = self._live.get(tensor.untyped_storage()._cdata)
        if entry is not None:
            entry[1].category = category

    def place(self, tensor: torch.Tensor, module: str) -> None:
        """Fix the module of a tensor's storage (a parameter's, once adapters are in)."""
        entry = self._live.get(tensor.untyped_storage()._cdata)
        if entry is not None:
            entry[1].module = module

    @contextmanager
    def during(self, phase: Phase, category: Category | None = None) -> Iterator[None]:
        """Events inside carry `phase` (and `category`); a new section begins and ends with it."""
        before = (self.phase, self.category)
        self.phase, self.category = phase, category
        if phase == "forward" and before[0] != "backward":
            self.work.begin_micro_batch()
        self.section += 1
        try:
            yield
        finally:
            self.phase, self.category = before
            self.section += 1

    def product(self, func: Any, args: tuple, kwargs: dict[str, Any], out: torch.Tensor) -> None:
        """A matrix product into `out`, called by code that no mode sees."""
        if func in MATRIX_PRODUCTS:
            self._workspaces(func, args)
        self.work.count(self.phase, func, args, kwargs, out)

    def empty_cache(self) -> None:
        """`torch.cuda.empty_cache()` was called here: no bytes, but a mark for the allocator."""
        self.events.append(self._event("empty_cache", 0, "empty_cache", None))

    def take(self) -> list[Event]:
        """The events so far, removed from the recorder (what lives stays known to it)."""
        events, self.events = self.events, []
        return events

    def note_unknown(self, what: str) -> None:
        self.unknown.setdefault(what)

    def _workspaces(self, func: Any, args: tuple) -> None:
        """cuBLAS takes one workspace a handle after the first product's output, and each thread
        that multiplies has its handle: the caller's and autograd's. They stay (ATen/cuda/
        CublasHandlePool.cpp). A product with a bias goes through cublasLt, which has its own."""
        thread = "backward" if self.phase in ("backward", "recompute") else "forward"
        wanted = [("cuBLAS workspace", self.target.cublas_workspace_bytes)]
        if func is _aten.addmm.default and args[0].dim() == 1:
            wanted = [("cublasLt workspace", LT_WORKSPACE_BYTES)]
        for name, size in wanted:
            if (name, thread) not in self._handles:
                self._handles.add((name, thread))
                self.begin(name, size).category = "workspace"

    def _event(self, kind: Any, size_bytes: int, func: Any, tensor: torch.Tensor | None) -> Event:
        self._count += 1
        shape = tuple(tensor.shape) if tensor is not None else ()
        dtype = str(tensor.dtype).removeprefix("torch.") if tensor is not None else "uint8"
        return Event(
            kind, self._count, size_bytes, _name(func), self.scope.module(self.phase), self.phase,
            shape, dtype, self.category, self.step, self.section,
        )  # fmt: skip

    def _gone(self, key: int, _: object) -> None:
        _, event, _ = self._live.pop(key)
        self.events.append(self._release(event))

    def _release(self, event: Event) -> Event:
        return Event(
            "free", event.storage_id, event.size_bytes, event.op, event.module, self.phase,
            event.shape, event.dtype, event.category, self.step, self.section,
        )  # fmt: skip


def _name(func: Any) -> str:
    if func is None or isinstance(func, str):
        return func or ""
    return str(getattr(func, "_overloadpacket", func)).removeprefix("aten.")
