"""What autograd keeps for backward, by the type of the module whose forward saved it."""

from __future__ import annotations

from collections import Counter
from types import TracebackType
from typing import Any

import torch


class SavedTensors:
    """A context that counts, once a storage, the bytes saved for backward in the forwards under it.

    Parameters are left out: they are alive anyway. Recomputation under checkpointing saves again
    within backward; storages are counted once while they live.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model
        self._bytes: Counter[str] = Counter()
        self._own = {p.untyped_storage()._cdata for p in model.parameters()}
        self._stack: list[str] = []
        self._seen: set[int] = set()
        self._handles: list[Any] = []
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda t: t)

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._own and key not in self._seen:
            self._seen.add(key)
            self._bytes[self._stack[-1] if self._stack else "outside"] += storage.nbytes()
        return tensor

    def __enter__(self) -> SavedTensors:
        for module in self.model.modules():
            name = type(module).__name__
            self._handles.append(
                module.register_forward_pre_hook(lambda *_, name=name: self._stack.append(name))
            )
            self._handles.append(
                module.register_forward_hook(lambda *_: self._pop(), always_call=True)
            )
        self._hooks.__enter__()
        return self

    def _pop(self) -> None:
        if self._stack:
            self._stack.pop()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._hooks.__exit__(kind, error, trace)
        for handle in self._handles:
            handle.remove()

    def by_module_type(self) -> dict[str, int]:
        """Module class -> bytes, largest first."""
        return dict(self._bytes.most_common())
