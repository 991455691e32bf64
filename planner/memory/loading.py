"""Loading: the tensors that stay on the device before the first step, and the peak on the way.

Sources: transformers/integrations/bitsandbytes.py (which linears are replaced, quantised one by one
as their shard is read), bitsandbytes/functional.py (4-bit layout: blocks of 64; doubly quantised
absmax in blocks of 256), peft/utils/other.py (prepare_model_for_kbit_training: every 16-bit
parameter to fp32), peft/tuners (adapters in fp32).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

from planner.dtypes import DType
from planner.memory.loaded import Loaded
from planner.memory.storage import BLOCK_BYTES
from planner.models.tree import Module

F32, UINT8, INT8 = DType.FLOAT32, DType.UINT8, DType.INT8
BLOCK_WEIGHTS = 64
NESTED_BLOCK = 256


@dataclass(frozen=True, slots=True)
class Resident:
    """One tensor that stays: rounded bytes, whose it is, and what."""

    nbytes: int
    component: str
    what: str


def rounded(nbytes: int) -> int:
    """Bytes as the allocator counts them."""
    return -(-nbytes // BLOCK_BYTES) * BLOCK_BYTES


def resident_tensors(loaded: Loaded) -> Iterator[Resident]:
    """Every tensor on the device after loading and adapter set-up."""
    for module in loaded.tree.modules:
        shapes = module.shapes[1:] if module.tied_to else module.shapes
        quantized = loaded.is_quantized(module)
        for name, shape in shapes:
            if quantized and name == "weight":
                yield from _quantized_weight(loaded, module)
            else:
                nbytes = rounded(prod(shape) * loaded.dtype.itemsize)
                yield Resident(nbytes, module.component, loaded.dtype.value)
        if module.path in loaded.adapted:
            yield from _adapter(loaded, module)


def _quantized_weight(loaded: Loaded, module: Module) -> Iterator[Resident]:
    size = prod(module.weight_shape)
    kind, component = loaded.spec.quantization, module.component
    if kind == "int8":
        yield Resident(rounded(size), component, "int8 weight")
        yield Resident(rounded(module.weight_shape[0] * 4), component, "int8 row scales")
        return
    yield Resident(rounded(-(-size // 2)), component, f"{kind} weight")
    blocks = -(-size // BLOCK_WEIGHTS)
    if loaded.spec.double_quant:
        yield Resident(rounded(blocks), component, "absmax")
        nested = -(-blocks // NESTED_BLOCK)
        yield Resident(rounded(nested * 4), component, "nested absmax")
        yield Resident(2 * BLOCK_BYTES, component, "code and offset")
    else:
        yield Resident(rounded(blocks * 4), component, "absmax")
        yield Resident(BLOCK_BYTES, component, "code and offset")


def _adapter(loaded: Loaded, module: Module) -> Iterator[Resident]:
    rank = loaded.spec.lora.rank
    out_features, in_features = module.weight_shape[0], prod(module.weight_shape[1:])
    for size in (rank * in_features, out_features * rank):
        yield Resident(rounded(size * 4), "adapter", "LoRA")


def adapter_parameters(loaded: Loaded) -> int:
    """Elements of all adapters."""
    rank = loaded.spec.lora.rank
    shapes = (loaded.tree.by_path[path].weight_shape for path in loaded.adapted)
    return sum(rank * (shape[0] + prod(shape[1:])) for shape in shapes)
