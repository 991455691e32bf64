"""Optimizer states: their bytes, in the order in which they are made."""

# Annotations stay objects here: named tuples would compile each string at import.
from collections import Counter
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
    names, are_embeddings = _in_groups(loaded.tree, tuple(leaves))
    ordered = [leaves[name] for name in names]
    known = {  # layers share leaves
        leaf: _state_sizes(optimizer.states(leaf, is_embedding))
        for leaf, is_embedding in dict(zip(ordered, are_embeddings, strict=True)).items()
    }
    for on_device, _, _ in map(known.__getitem__, ordered):
        device += on_device
    for leaf, times in Counter(ordered).items():
        paged += times * known[leaf][1]
        host += times * known[leaf][2]
    return StateBytes(sum(device), paged, tuple(device), host)


@lru_cache(maxsize=16)
def _in_groups(tree: ModelTree, names: tuple[str, ...]) -> tuple[list[str], list[bool]]:
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
    keys.sort()
    return [key[2] for key in keys], [key[3] for key in keys]


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
