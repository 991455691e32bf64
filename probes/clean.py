"""Taking a model back to the state it had before a run, so that the next measures as the first.

A run leaves more than gradients behind: `Trainer` keeps the wrapped forward and its
`_is_accelerate_prepared`, which makes the next `Trainer` train without autocast;
`enable_input_require_grads` leaves a hook that makes the next run save the frozen body;
checkpointing leaves its flags; the lean step swaps classes. Every module's class and attributes are
therefore copied before and put back after.
"""

from __future__ import annotations

import copy
import traceback
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

# Values of trainable parameters are kept too when they are no more than this (adapters are).
_VALUES_BYTES = 1 << 30


@dataclass
class ModelState:
    """What a model was: class and attributes of every module, its config, flags and values of
    parameters."""

    classes: list[tuple[torch.nn.Module, type]] = field(default_factory=list)
    attributes: list[tuple[torch.nn.Module, dict[str, Any]]] = field(default_factory=list)
    configs: list[tuple[Any, dict[str, Any]]] = field(default_factory=list)
    flags: list[tuple[torch.nn.Parameter, bool, torch.Tensor | None]] = field(default_factory=list)


def remember(model: torch.nn.Module, values: bool = True) -> ModelState:
    """Copy what `restore` puts back. Values of the trainable parameters (unless `values` is
    False, or they are many) go to the host."""
    state = ModelState()
    seen: set[int] = set()
    for module in model.modules():
        state.classes.append((module, type(module)))
        state.attributes.append((module, _shallow(module.__dict__)))
        config = module.__dict__.get("config")
        if config is not None and hasattr(config, "__dict__") and id(config) not in seen:
            seen.add(id(config))
            state.configs.append((config, _shallow(config.__dict__)))
    trainable = [p for p in model.parameters() if p.requires_grad]
    keep = values and sum(p.numel() * p.element_size() for p in trainable) <= _VALUES_BYTES
    for parameter in model.parameters():
        value = _on_host(parameter) if keep and parameter.requires_grad else None
        state.flags.append((parameter, parameter.requires_grad, value))
    return state


def _on_host(parameter: torch.nn.Parameter) -> torch.Tensor:
    """A copy that no meter counts: it is ours, not the workload's."""
    with _disable_current_modes():
        return parameter.detach().cpu().clone()


def restore(state: ModelState) -> None:
    """Put everything back; gradients are dropped."""
    for module, kind in state.classes:
        if type(module) is not kind:
            module.__class__ = kind
    for owner, attributes in (*state.attributes, *state.configs):
        owner.__dict__.clear()
        owner.__dict__.update(_shallow(attributes))
    for parameter, requires_grad, _ in state.flags:
        parameter.requires_grad_(requires_grad)
    restore_values(state)


def restore_values(state: ModelState) -> None:
    """Gradients dropped, values as they were where they were kept; nothing else."""
    with torch.no_grad():
        for parameter, _, value in state.flags:
            parameter.grad = None
            if value is not None:
                parameter.copy_(value)


def _shallow(attributes: dict[str, Any]) -> dict[str, Any]:
    """A copy whose containers (hooks, parameters, submodules) are copies too, one level down."""
    containers = (dict, list, set)
    return {
        key: copy.copy(value) if isinstance(value, containers) else value
        for key, value in attributes.items()
    }


def drop_frames(error: BaseException | None) -> str:
    """The error in one line; its traceback's frames let go of the tensors they hold."""
    text = f"{type(error).__name__}: {error}"
    while error is not None:
        if error.__traceback__ is not None:
            traceback.clear_frames(error.__traceback__)
        follow = error.__cause__ or error.__context__
        error.__traceback__ = error.__cause__ = error.__context__ = None
        error = follow
    return text
