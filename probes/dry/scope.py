"""Which module an operation belongs to: by hooks in forward, by autograd's sequence numbers in
backward (the way torch's profiler links a backward node to the forward that made it)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.modules import module as torch_module

_NO_SEQUENCE = 2**64 - 1  # AccumulateGrad nodes have none


class Scope:
    """Paths of the modules now running, innermost last."""

    def __init__(self) -> None:
        self.names: dict[int, str] = {}
        self._stack: list[str] = []
        self._by_sequence: dict[int, str] = {}
        self._parameters: dict[int, str] = {}

    def name(self, model: torch.nn.Module) -> None:
        """Learn the paths of `model`'s modules and parameters (again, after adapters are in)."""
        self.names = {id(module): path for path, module in model.named_modules()}
        self._parameters = {id(p): path for path, p in model.named_parameters()}

    def module(self, phase: str) -> str:
        """Path of the module the current operation belongs to."""
        if self._stack:
            path = self._stack[-1]
            if torch.is_grad_enabled():
                self._by_sequence[torch._C._autograd._get_sequence_nr() - 1] = path
            return path
        node = torch._C._current_autograd_node() if phase == "backward" else None
        return self._of_node(node) if node is not None else ""

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """Follow every module call while inside."""
        enter = torch_module.register_module_forward_pre_hook(self._enter)
        leave = torch_module.register_module_forward_hook(self._leave, always_call=True)
        try:
            yield
        finally:
            enter.remove()
            leave.remove()

    @contextmanager
    def inside(self, path: str) -> Iterator[None]:
        """Operations inside belong to `path`, called or not."""
        self._stack.append(path)
        try:
            yield
        finally:
            self._stack.pop()

    def _enter(self, module: torch.nn.Module, _: Any) -> None:
        self._stack.append(self.names.get(id(module), ""))

    def _leave(self, *_: Any) -> None:
        self._stack.pop()

    def _of_node(self, node: Any) -> str:
        number = node._sequence_nr()
        if number >= _NO_SEQUENCE or number < 0:
            variable = getattr(node, "variable", None)
            return self._parameters.get(id(variable), "") if variable is not None else ""
        return self._by_sequence.get(number, "")
