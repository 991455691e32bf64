"""Optimizer states and temporaries, by the names `TrainingArguments.optim` takes.

Sources: torch/optim (adamw.py, _multi_tensor_adam: one foreach square root of every second moment),
bitsandbytes/optim/optimizer.py (8-bit states above 4,096 elements with an fp32 absmax a block of
256; paged buffers from 100,000 elements, outside torch's allocator), transformers/optimization.py
(Adafactor) and trainer.py (embedding tables keep 32-bit states under 8-bit Adam). Those of other
packages are in planner.memory.packaged and low_rank; planner.memory.optimizers finds each.
"""

from __future__ import annotations

from collections import Counter
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple

from planner.dtypes import F32, UINT8, DType
from planner.memory.ops import Engine
from planner.memory.tensor import Tensor

if TYPE_CHECKING:
    from planner.memory.loaded import Loaded

MIN_8BIT_ELEMENTS = 4096
MIN_PAGED_ELEMENTS = 100_000
BLOCK_ELEMENTS = 256

# name -> states a parameter (each as large as it)
TORCH = {"adamw_torch": 2, "adamw_torch_fused": 2, "sgd": 0, "adagrad": 1, "rmsprop": 1}
_BITSANDBYTES = {"adamw": 2, "lion": 1, "rmsprop": 1, "ademamix": 3}


class State(NamedTuple):
    """One state tensor of one parameter. `paged`: managed memory, invisible to the allocator;
    `host`: in host memory."""

    shape: tuple[Any, ...]
    dtype: DType
    paged: bool = False
    host: bool = False


class Optimizer:
    """A named optimizer: its states, and what its step makes for a moment.

    in_backward: each parameter is stepped during backward and its gradient dropped; waits: not
    before the next parameter's gradient is there; replaces_gradients: its step drops them one by
    one.
    """

    in_backward = False
    waits = False
    replaces_gradients = False

    def __init__(self, name: str) -> None:
        self.name = name

    def states(self, leaf: Tensor, is_embedding: bool = False) -> list[State]:
        """State tensors of a parameter."""
        if self.name == "adafactor":
            return _adafactor_states(leaf)
        if self.name in TORCH:
            states = [State(leaf.shape, leaf.dtype)] * TORCH[self.name]
            return [*states, State((), F32)] if self.name == "adamw_torch_fused" else states
        return bitsandbytes_states(self.name, leaf.shape, is_embedding)

    def base_states(self, loaded: Loaded) -> list[State]:
        """States that do not belong to the parameters that get a gradient."""
        return []

    def leaf_step(self, t: Engine, leaf: Tensor) -> None:
        """The step of one parameter, where `in_backward`; its gradient goes."""
        raise NotImplementedError(self.name)

    def step(self, t: Engine, leaves: list[Tensor]) -> None:
        """optimizer.step(): temporaries and work."""
        sizes: Any = sum(times * prod(leaf.shape) * leaf.dtype.itemsize
                         for leaf, times in Counter(leaves).items())  # fmt: skip
        with t.recorder.scope("optimizer"):
            if self.name in ("adamw_torch", "rmsprop"):
                held = [t.new(leaf.shape, leaf.dtype, "sqrt (foreach)") for leaf in leaves]
                t.count(12 * sizes, 12 * (1 + len(leaves) / 36))
                del held
            elif self.name == "adagrad":
                held = [t.new(leaf.shape, leaf.dtype, "mul (foreach)") for leaf in leaves]
                held += [t.new(leaf.shape, leaf.dtype, "sqrt (foreach)") for leaf in leaves]
                t.count(10 * sizes, 8 * (1 + len(leaves) / 36))
                del held
            elif self.name == "adafactor":
                for leaf in leaves:
                    _adafactor_step(t, leaf)
            elif self.name in ("adamw_torch_fused", "sgd"):
                t.count(7 * sizes if self.name != "sgd" else 3 * sizes, 1 + len(leaves) / 36)
            else:
                t.count(5 * sizes, 2 * len(leaves))
                t.work.quantized += sum(
                    prod(state.shape)
                    for leaf in leaves
                    for state in self.states(leaf)
                    if state.dtype is UINT8
                )


def is_own(name: str) -> bool:
    """Whether this file has its rules: torch's, transformers' and bitsandbytes' own."""
    return name in TORCH or name == "adafactor" or _family(name) in _BITSANDBYTES


def bitsandbytes_states(
    name: str, shape: tuple[Any, ...], is_embedding: bool = False
) -> list[State]:
    """States of a parameter of this shape, of bitsandbytes' optimizer of that name."""
    size, count = prod(shape), _BITSANDBYTES[_family(name)]
    eight_bit = name.endswith("8bit") and size >= MIN_8BIT_ELEMENTS
    if eight_bit and is_embedding and "adam" in name:
        eight_bit = False
    paged = name.startswith("paged") and size >= MIN_PAGED_ELEMENTS
    if not eight_bit:
        return [State(shape, F32, paged)] * count
    blocks = -(-size // BLOCK_ELEMENTS)
    return [State(shape, UINT8, paged)] * count + [State((blocks,), F32)] * count


def _family(name: str) -> str:
    stem = name.removeprefix("paged_").replace("_bnb", "")
    stem = stem.removesuffix("_8bit").removesuffix("_32bit")
    bitsandbytes = name != stem or name in ("ademamix",)
    return stem if bitsandbytes and name not in _TORCH_ONLY else ""


_TORCH_ONLY = frozenset({"adamw_torch_8bit", "galore_adamw_8bit"})


def _adafactor_states(leaf: Tensor) -> list[State]:
    shape = leaf.shape
    if len(shape) < 2:
        return [State(shape, F32)]
    return [State(shape[:-1], F32), State((*shape[:-2], shape[-1]), F32)]


def _adafactor_step(t: Engine, leaf: Tensor) -> None:
    """Adafactor.step for one parameter: fp32 copies of gradient and weight where they are 16-bit,
    the squared gradient, the update, its negative."""
    shape, size = leaf.shape, prod(leaf.shape) * 4
    half = leaf.dtype is not F32
    grad = t.new(shape, F32, "float (gradient)") if half else None
    weight = t.new(shape, F32, "float (weight)") if half else None
    squared = t.new(shape, F32, "pow (adafactor)")
    update = t.new(shape, F32, "add (adafactor)")
    del squared
    if len(shape) >= 2:
        fresh = t.new(shape, F32, "mul (adafactor)")
        update = fresh
        del fresh
    negated = t.new(shape, F32, "neg (adafactor)")
    del negated, update, grad, weight
    t.count(20 * size, 20)
