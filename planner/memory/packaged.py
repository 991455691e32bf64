"""Optimizers of packages beside the reference workload's, read from their sources.

Each class mirrors its package's `step`: the same temporaries under the same names, and a name in
Python's loop holds its tensor until it is bound anew, there as here. States in the order in which
they are made. Where transformers' trainer_optimizer.py passes arguments, they are its defaults.

Held against the packages themselves by tests/planner/memory/test_packaged.py.
"""

from __future__ import annotations

from math import prod

from planner.dtypes import F32, UINT8
from planner.memory.loaded import Loaded
from planner.memory.ops import Engine
from planner.memory.optimizer import MIN_8BIT_ELEMENTS, Optimizer, State
from planner.memory.tensor import Tensor

TORCHAO_BLOCK = 256  # transformers' default for both widths


class AnyPrecision(Optimizer):
    """torchdistx/optimizers/anyprecision_optimizer.py: both moments in fp32, no Kahan sum."""

    def states(self, leaf: Tensor, is_embedding: bool = False) -> list[State]:
        return [State(leaf.shape, F32)] * 2

    def step(self, t: Engine, leaves: list[Tensor]) -> None:
        with t.recorder.scope("optimizer"):
            for leaf in leaves:
                root = t.new(leaf.shape, F32, "sqrt")
                centered = t.new(leaf.shape, F32, "div")
                del root
                t.count(12 * prod(leaf.shape) * 4, 8)
            del centered


class LowBit(Optimizer):
    """torchao 0.18, optim/adam.py: codes, scales a block and a table for each moment; parameters
    below 4,096 elements, or not of whole blocks, keep plain moments. The update is one compiled
    kernel a parameter."""

    def states(self, leaf: Tensor, is_embedding: bool = False) -> list[State]:
        size = prod(leaf.shape)
        if size < MIN_8BIT_ELEMENTS or size % TORCHAO_BLOCK:
            return [State(leaf.shape, leaf.dtype)] * 2
        codes, table = (size // 2, 16) if self.name == "adamw_torch_4bit" else (size, 256)
        scales = size // TORCHAO_BLOCK
        return [State((codes,), UINT8), State((scales,), F32), State((table,), F32)] * 2

    def step(self, t: Engine, leaves: list[Tensor]) -> None:
        for leaf in leaves:
            t.count(prod(leaf.shape) * (3 * leaf.dtype.itemsize + 4), 2)


class ScheduleFree(Optimizer):
    """schedulefree 1.4.1 (adamw_, radam_ and sgd_schedulefree.py, foreach): a second copy of the
    weights; a denominator for all parameters at once where there is a second moment."""

    def states(self, leaf: Tensor, is_embedding: bool = False) -> list[State]:
        return [State(leaf.shape, leaf.dtype)] * (1 if self.name.endswith("sgd") else 2)

    def step(self, t: Engine, leaves: list[Tensor]) -> None:
        sizes = sum(prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)
        with t.recorder.scope("optimizer"):
            if self.name.endswith("sgd"):
                t.count(9 * sizes, 3 * (1 + len(leaves) / 36))
                return
            denominators = [t.new(leaf.shape, leaf.dtype, "div (foreach)") for leaf in leaves]
            t.count(21 * sizes, 9 * (1 + len(leaves) / 36))
            del denominators


class StableAdamW(Optimizer):
    """torch-optimi 0.3.3, stableadamw.py, its Triton kernels (its choice on CUDA): moments, a Kahan
    term beside 16-bit weights, and three scalars a parameter."""

    def states(self, leaf: Tensor, is_embedding: bool = False) -> list[State]:
        kahan = State(leaf.shape, leaf.dtype) if leaf.dtype.is_16bit else State((1,), UINT8)
        moments = [State(leaf.shape, leaf.dtype)] * 2
        return [*moments, State((), leaf.dtype), kahan, State((1,), F32)]

    def step(self, t: Engine, leaves: list[Tensor]) -> None:
        for leaf in leaves:
            t.count(8 * prod(leaf.shape) * leaf.dtype.itemsize, 3)


class GrokAdamW(Optimizer):
    """grokadamw 0.1.2: three moments in host memory, brought to the device for each parameter."""

    def states(self, leaf: Tensor, is_embedding: bool = False) -> list[State]:
        return [State(leaf.shape, leaf.dtype, host=True)] * 3

    def step(self, t: Engine, leaves: list[Tensor]) -> None:
        with t.recorder.scope("optimizer"):
            for leaf in leaves:
                shape, dtype = leaf.shape, leaf.dtype
                first, second = t.new(shape, dtype, "to"), t.new(shape, dtype, "to")
                average = t.new(shape, dtype, "to")
                scaled = t.new(shape, dtype, "mul")
                grad = t.new(shape, dtype, "add")
                del scaled
                root = t.new(shape, dtype, "sqrt")
                del root
                t.count(24 * prod(shape) * dtype.itemsize, 18)
            del first, second, average, grad


class Lomo(Optimizer):
    """lomo-optim 0.1.1, lomo.py: no states; a gradient is applied, in fp32, when the next one
    comes, and is gone."""

    in_backward = True
    waits = True

    def states(self, leaf: Tensor, is_embedding: bool = False) -> list[State]:
        return []

    def leaf_step(self, t: Engine, leaf: Tensor) -> None:
        shape = leaf.shape
        grad = leaf.grad
        assert grad is not None
        if grad.dtype is not F32:
            grad = t.new(shape, F32, "to (gradient)")
        leaf.grad = None
        self._update(t, leaf)
        weight = t.new(shape, F32, "to (weight)") if leaf.dtype is not F32 else None
        t.count(16 * prod(shape), 4)
        del grad, weight

    def _update(self, t: Engine, leaf: Tensor) -> None:
        """What comes between the fp32 gradient and the fp32 weight."""


class AdaLomo(Lomo):
    """lomo-optim 0.1.1, adalomo.py: as Lomo, with Adafactor's rows and columns in fp32, kept for
    every parameter of the model, frozen ones too; of a packed 4-bit weight, (n, 1), n rows."""

    def base_states(self, loaded: Loaded) -> list[State]:
        found = []
        for shape in _stored_shapes(loaded):
            found += [State(shape[:1], F32), *([State(shape[1:2], F32)] if len(shape) > 1 else [])]
        return found

    def leaf_step(self, t: Engine, leaf: Tensor) -> None:
        shape = leaf.shape
        grad = leaf.grad
        assert grad is not None
        if grad.dtype is not F32:
            grad = t.new(shape, F32, "to (gradient)")
        leaf.grad = None
        squared = t.new(shape, F32, "pow")
        update = t.new(shape, F32, "add")
        del squared
        fresh = t.new(shape, F32, "mul" if len(shape) > 1 else "rsqrt")
        update = fresh
        del fresh
        weight = t.new(shape, F32, "to (weight)") if leaf.dtype is not F32 else None
        t.count(60 * prod(shape), 20)
        del grad, update, weight


def _stored_shapes(loaded: Loaded) -> list[tuple[int, ...]]:
    """Shapes of all parameters as they lie on the device, in no order that matters."""
    shapes: list[tuple[int, ...]] = []
    four_bits = loaded.spec.quantization in ("nf4", "fp4")
    for module in loaded.tree.modules:
        for name, shape in module.shapes[1:] if module.tied_to else module.shapes:
            packed = four_bits and name == "weight" and loaded.is_quantized(module)
            shapes.append((prod(shape) // 2, 1) if packed else shape)
        if module.path in loaded.adapted:
            rank, (outs, *ins) = loaded.spec.lora.rank, module.weight_shape
            shapes += [(rank, *ins), (outs, rank)]
    return shapes


RULES: dict[str, type[Optimizer]] = {
    "adamw_anyprecision": AnyPrecision,
    "adamw_torch_4bit": LowBit,
    "adamw_torch_8bit": LowBit,
    "schedule_free_adamw": ScheduleFree,
    "schedule_free_radam": ScheduleFree,
    "schedule_free_sgd": ScheduleFree,
    "stable_adamw": StableAdamW,
    "grokadamw": GrokAdamW,
    "lomo": Lomo,
    "adalomo": AdaLomo,
}
