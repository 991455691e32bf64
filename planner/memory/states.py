"""Optimizer states: their bytes, in the order in which they are made."""

# Annotations stay objects here: named tuples would compile each string at import.
from functools import lru_cache
from math import prod
from typing import NamedTuple

from planner.memory.loaded import Loaded
from planner.memory.loading import rounded
from planner.memory.optimizer import Optimizer, State
from planner.memory.tensor import Tensor
from planner.models.tree import ModelTree


class StateBytes(NamedTuple):
    """Optimizer states: on the device through the allocator, paged (managed memory), and in host
    memory."""

    device_bytes: int
    paged_bytes: int
    tensors: tuple[int, ...]
    host_bytes: int = 0


def state_bytes(loaded: Loaded, optimizer: Optimizer, leaves: dict[str, Tensor]) -> StateBytes:
    """Optimizer states of the parameters that get a gradient, by name, in the order they are made:
    Trainer's two groups (norms and biases last, without decay), each in the model's order."""
    device, paged, host = _state_sizes(optimizer.base_states(loaded))
    sizes: dict[int, tuple[list[int], int, int]] = {}  # of a tensor that layers share
    for name, is_embedding in _in_groups(loaded.tree, tuple(leaves)):
        leaf = leaves[name]
        known = sizes.get(id(leaf))
        if known is None:
            known = sizes[id(leaf)] = _state_sizes(optimizer.states(leaf, is_embedding))
        device += known[0]
        paged += known[1]
        host += known[2]
    return StateBytes(sum(device), paged, tuple(device), host)


@lru_cache(maxsize=16)
def _in_groups(tree: ModelTree, names: tuple[str, ...]) -> list[tuple[str, bool]]:
    """Parameters in Trainer's order, and whether each is an embedding's table."""
    positions = {module.path: index for index, module in enumerate(tree.modules)}
    keys = []
    for name in names:
        path, _, adapter = name.partition(".lora_")
        if not adapter:
            path = name.rpartition(".")[0]
        kind = tree.by_path[path].kind
        plain = name.endswith("bias") or kind == "norm"
        keys.append((plain, positions[path], name, kind == "embedding" and not adapter))
    return [(name, is_embedding) for _, _, name, is_embedding in sorted(keys)]


def _state_sizes(states: list[State]) -> tuple[list[int], int, int]:
    """Bytes of each state on the device, and of the paged and the host's in all."""
    paged = host = 0
    device = []
    for state in states:
        nbytes = rounded(max(prod(state.shape), 1) * state.dtype.itemsize)
        if state.paged:
            paged += nbytes
        elif state.host:
            host += nbytes
        else:
            device.append(nbytes)
    return device, paged, host
