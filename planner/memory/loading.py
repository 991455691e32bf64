"""Loading: what each tensor does to the allocator on the way, and what stays before the first step.

Sources: transformers 5.17 (modeling_utils.py caching_allocator_warmup: one block of the model's
size is taken and given back, so that the weights are carved from it; core_model_loading.py: tensors
arrive by natural order of their names, quantised on arrival), bitsandbytes/functional.py
(quantize_4bit: blocks of 64; a doubly quantised absmax in blocks of 256), peft/utils/other.py
(prepare_model_for_kbit_training: every 16-bit parameter to fp32, then an emptied cache), peft
tuners_utils.py (adapters in the base's dtype, then fp32).
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from functools import lru_cache
from math import prod
from typing import NamedTuple

from planner.dtypes import F32, DType
from planner.memory.loaded import Loaded
from planner.memory.storage import BLOCK_BYTES
from planner.models.tree import ModelTree, Module

BLOCK_WEIGHTS = 64
NESTED_BLOCK = 256
NESTED_CODE_BYTES = 1024  # 256 fp32 values of the dynamic map


def rounded(nbytes: int) -> int:
    """Bytes as the allocator counts them."""
    return max(-(-nbytes // BLOCK_BYTES), 1) * BLOCK_BYTES


class _Arrival(NamedTuple):
    """What one tensor's arrival does, keys counted from its first allocation."""

    sizes: array[int]
    events: list[int]
    stays: list[tuple[int, tuple[str, str]]]


class Loading:
    """The allocator's events of loading, k-bit preparation and adapter set-up (LoRA's, or modules
    that are trained whole).

    sizes: bytes of each allocation; parts: i for the allocation of sizes[i], ~i for its release,
    the cache emptied between one part and the next; resident_bytes: sum of the tensors that stay
    (the allocator's blocks hold a little more).
    """

    def __init__(self, loaded: Loaded) -> None:
        self.loaded = loaded
        base = _base(loaded)
        self._base = base
        self._adapters: list[int] = []
        self.sizes = base.sizes[:]
        *before, last = base.parts
        self.parts: list[array[int]] = [*before, last[:]]
        self._add_adapters()
        own = sum(map(self.sizes.__getitem__, self._adapters))
        self.resident_bytes = base.resident_bytes + own

    @property
    def stays(self) -> dict[int, tuple[str, str]]:
        """Whose each lasting allocation is: (component, what)."""
        kind = self.loaded.trained_dtype.value if self.loaded.trained else "LoRA"
        return self._base.stays | dict.fromkeys(self._adapters, ("adapter", kind))

    def _add_adapters(self) -> None:
        """peft: fp32 beside quantised and fp32 weights, else 16 bits that are then cast."""
        loaded, last = self.loaded, self.parts[-1]
        itemsize, rank = DType(loaded.spec.weights_dtype).itemsize, loaded.spec.lora.rank
        sizes, casts = self.sizes, loaded.casts_to_fp32
        for _, shape in _parameters(loaded.tree, loaded.trained):
            self._adapters.append(len(sizes))
            last.append(len(sizes))
            sizes.append(rounded(prod(shape) * loaded.trained_dtype.itemsize))
        modules, elements = _adapted_modules(loaded.tree, loaded.adapted)
        single = {count: rounded(rank * count * 4) for count in set(elements)}
        wide = [casts or loaded.is_quantized(module) for module in modules for _ in "AB"]
        first = len(sizes)
        last.extend(range(first, first + len(elements)))
        if all(wide):
            sizes.extend(map(single.__getitem__, elements))
            self._adapters += range(first, len(sizes))
            return
        half = {count: rounded(rank * count * itemsize) for count in single}
        sizes.extend([(single if fp32 else half)[count]
                      for count, fp32 in zip(elements, wide, strict=True)])  # fmt: skip
        self._adapters += [first + place for place, fp32 in enumerate(wide) if fp32]
        for place, fp32 in enumerate(wide):
            if not fp32:
                last.extend((len(sizes), ~(first + place)))
                self._adapters.append(len(sizes))
                sizes.append(single[elements[place]])


def _base(loaded: Loaded) -> _Base:
    """Loading without the adapters: the same for whatever does not change the weights."""
    spec = loaded.spec
    key = (spec.quantization, spec.double_quant, spec.weights_dtype, spec.stack, loaded.unquantized,
           loaded.trained, loaded.own_step)  # fmt: skip
    known = _bases(loaded.tree)
    if key not in known:
        known[key] = _Base(loaded)
    return known[key]


class _Base:
    """The allocator's events of loading and k-bit preparation; as Loading."""

    def __init__(self, loaded: Loaded) -> None:
        self.loaded = loaded
        self.spec = loaded.spec
        self.sizes = array("q")
        self.parts: list[array[int]] = [array("q")]
        self.stays: dict[int, tuple[str, str]] = {}
        self._warm_up()
        self._load()
        self.resident_bytes = sum(map(self.sizes.__getitem__, self.stays))

    def _load(self) -> None:
        loaded = self.loaded
        plain: list[tuple[int, Module, tuple[int, ...]]] = []
        alike: dict[tuple[object, ...], _Arrival] = {}
        for module, name, shape in arrivals(loaded.tree):
            if module.path in loaded.trained:
                continue
            quantized = loaded.is_quantized(module) and name == "weight"
            kind = (quantized, module.component, shape)
            arrival = alike.get(kind)
            first = len(self.sizes)
            if arrival is not None:
                self._repeat(arrival)
            else:
                events = len(self.parts[-1])
                self._arrive(module, quantized, shape)
                alike[kind] = _Arrival(
                    self.sizes[first:],
                    [event - first if event >= 0 else event + first
                     for event in self.parts[-1][events:]],
                    [(key - first, self.stays[key]) for key in range(first, len(self.sizes))
                     if key in self.stays],
                )  # fmt: skip
            if not quantized:
                plain.append((first, module, shape))
        if loaded.casts_to_fp32:
            self._cast_to_fp32(plain)
        if loaded.quantized and loaded.spec.stack == "stock" and not loaded.own_step:
            self.parts.append(array("q"))

    def _repeat(self, arrival: _Arrival) -> None:
        """What a tensor of the same shape and storage did."""
        first = len(self.sizes)
        self.sizes.extend(arrival.sizes)
        self.parts[-1].extend([e + first if e >= 0 else e - first for e in arrival.events])
        for key, owner in arrival.stays:
            self.stays[first + key] = owner

    def _take(self, nbytes: int) -> int:
        key = len(self.sizes)
        self.sizes.append((nbytes + 511) & -512 or BLOCK_BYTES)
        self.parts[-1].append(key)
        return key

    def _give(self, key: int) -> None:
        self.parts[-1].append(~key)

    def _keep(self, nbytes: int, component: str, what: str) -> int:
        key = self._take(nbytes)
        self.stays[key] = (component, what)
        return key

    def _warm_up(self) -> None:
        dtype = DType(self.spec.weights_dtype)
        total = 0.0
        for module in self.loaded.tree.modules:
            if module.path in self.loaded.trained:
                continue
            quantized = self.loaded.is_quantized(module)
            bits = 1 if self.spec.quantization == "int8" else 0.5
            for name, shape in module.shapes[1:] if module.tied_to else module.shapes:
                packed = quantized and name == "weight"
                total += prod(shape) * (bits if packed else dtype.itemsize)
        self._give(self._take(int(total // 2) * 2))

    def _arrive(self, module: Module, quantized: bool, shape: tuple[int, ...]) -> None:
        dtype = DType(self.spec.weights_dtype)
        if not quantized:
            self._keep(prod(shape) * dtype.itemsize, module.component, dtype.value)
        elif self.spec.quantization == "int8":
            self._quantize_8bit(module)
        else:
            self._quantize_4bit(module)

    def _quantize_4bit(self, module: Module) -> None:
        size, component = prod(module.weight_shape), module.component
        source = self._take(size * 2)
        blocks = -(-size // BLOCK_WEIGHTS)
        what = f"{self.spec.quantization} weight"
        if not self.spec.double_quant:
            self._keep(blocks * 4, component, "absmax")
            self._keep(-(-size // 2), component, what)
            self._keep(64, component, "code")
            self._give(source)
            return
        maxima = self._take(blocks * 4)
        self._keep(-(-size // 2), component, what)
        self._keep(64, component, "code")
        self._keep(4, component, "offset")
        centred = self._take(blocks * 4)
        self._keep(NESTED_CODE_BYTES, component, "nested code")
        self._keep(-(-blocks // NESTED_BLOCK) * 4, component, "nested absmax")
        self._keep(blocks, component, "absmax")
        self._give(centred)
        self._give(maxima)
        self._give(source)

    def _quantize_8bit(self, module: Module) -> None:
        """int8 weights come back from the host in 16 bits, become fp16, then rows of int8."""
        size = prod(module.weight_shape)
        first = self._take(size * 2)
        half = self._take(size * 2)
        self._keep(module.weight_shape[0] * 4, module.component, "int8 row scales")
        self._keep(size, module.component, "int8 weight")
        self._give(half)
        self._give(first)

    def _cast_to_fp32(self, plain: list[tuple[int, Module, tuple[int, ...]]]) -> None:
        order = self.loaded.positions
        for key, module, shape in sorted(plain, key=lambda entry: (order[entry[1].path], entry[0])):
            self._keep(prod(shape) * 4, module.component, F32.value)
            self._give(key)
            del self.stays[key]


def adapter_parameters(loaded: Loaded) -> int:
    """Elements of all adapters."""
    own = sum(loaded.tree.by_path[path].parameters for path in loaded.trained)
    return own + loaded.spec.lora.rank * sum(_adapted_modules(loaded.tree, loaded.adapted)[1])


@lru_cache(maxsize=8)
def _parameters(
    tree: ModelTree, paths: frozenset[str]
) -> tuple[tuple[Module, tuple[int, ...]], ...]:
    """Each parameter of the modules at `paths`, in the model's order."""
    chosen = (module for module in tree.modules if module.path in paths)
    return tuple((module, shape) for module in chosen for _, shape in module.shapes)


@lru_cache(maxsize=8)
def _adapted_modules(tree: ModelTree, adapted: frozenset[str]) -> tuple[list[Module], list[int]]:
    """The adapted modules in the model's order; at rank 1, the elements of each one's A and B."""
    modules = [module for module in tree.modules if module.path in adapted]
    shapes = [module.weight_shape for module in modules]
    return modules, [count for outs, *ins in shapes for count in (prod(ins), outs)]


@lru_cache(maxsize=4)
def _bases(tree: ModelTree) -> dict[tuple[object, ...], _Base]:
    """The loadings of a model, adapters apart, by what decides them."""
    return {}


@lru_cache(maxsize=8)
def _arrivals(tree: ModelTree) -> tuple[tuple[Module, str, tuple[int, ...]], ...]:
    named = [
        (module, name, shape)
        for module in tree.modules
        for name, shape in (module.shapes[1:] if module.tied_to else module.shapes)
    ]
    return tuple(sorted(named, key=lambda entry: natural_key(f"{entry[0].path}.{entry[1]}")))


def arrivals(tree: ModelTree) -> Iterator[tuple[Module, str, tuple[int, ...]]]:
    """Parameters in the order they arrive: by name, numbers by value."""
    return iter(_arrivals(tree))


def natural_key(name: str) -> list[tuple[int, int | str, int]]:
    """core_model_loading.dot_natural_key: parts between dots, digits as numbers and first."""
    key: list[tuple[int, int | str, int]] = []
    for part in name.split("."):
        if part.isdigit():
            key.append((0, int(part), 0))
        else:
            stem = part.rstrip("0123456789")
            digits = part[len(stem) :]
            key.append((1, stem, int(digits) if digits else -1))
    return key
