"""What a CUDA kernel does behind one operation: a table, a file an entry.

An entry is called instead of the operation, with (recorder, func, args, kwargs), and returns what
the operation returns; it tells the recorder of the kernel's own temporaries.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import Any

Standin = Callable[[Any, Any, tuple, dict[str, Any]], Any]
_TABLE: dict[str, Standin] = {}
_FILES = (
    "adapted_linear", "attention", "bitsandbytes_4bit", "bitsandbytes_8bit", "convolution",
    "dropout", "foreach", "indexing", "normalisation", "softmax",
)  # fmt: skip


def stands_for(*names: str) -> Callable[[Standin], Standin]:
    """Register an entry under operation names as torch's schemas spell them ("aten::bmm")."""

    def register(entry: Standin) -> Standin:
        for name in names:
            _TABLE[name] = entry
        return entry

    return register


def lookup(func: Any) -> Standin | None:
    """The stand-in of an operation, or None when its meta kernel tells the truth."""
    _load()
    return _TABLE.get(func._schema.name)


@cache
def _load() -> None:
    for name in _FILES:
        import_module(f"probes.dry.standins.{name}")


_KNOWN_LIBRARIES = ("aten", "prims", "bitsandbytes", "profiler")
_WORKSPACES = {
    "aten::convolution_backward": "convolution: cuDNN's workspace is not counted in backward",
}


def doubt(func: Any) -> str | None:
    """Why an operation without a stand-in is not known for certain, or None."""
    name = func._schema.name
    if func.namespace not in _KNOWN_LIBRARIES:
        return f"{name}: a library's own kernel, counted by its results alone"
    return _WORKSPACES.get(name)
