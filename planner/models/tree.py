"""A model as torch sees it, without torch: every module by its transformers path, with the shapes
of its parameters. Adapters, quantization and counts are all decided by walking this tree."""

# Annotations stay objects here: named tuples would compile each string at import.
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Literal, NamedTuple

Kind = Literal["linear", "embedding", "norm", "conv", "other"]
Component = Literal[
    "embeddings", "language_model", "lm_head", "vision_tower", "projector", "image_tokenizer",
    "adapter",
]  # fmt: skip


class Module(NamedTuple):
    """A leaf module that owns parameters.

    path: its name in `model.named_modules()` of the transformers class that trains it
    ("model.layers.0.self_attn.q_proj"); shapes: (parameter name, shape) in torch's order, a linear
    weight being (out_features, in_features); tied_to: the path whose weight it shares.
    """

    path: str
    kind: Kind
    component: Component
    shapes: tuple[tuple[str, tuple[int, ...]], ...]
    tied_to: str | None = None

    @property
    def parameters(self) -> int:
        """Elements of its own (a tied weight counts where it is first owned, and 0 here)."""
        shapes = self.shapes[1:] if self.tied_to else self.shapes
        return sum(prod(shape) for _, shape in shapes)

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Shape of the first parameter."""
        return self.shapes[0][1]


@dataclass(frozen=True)
class ModelTree:
    """All modules of one model, in torch's order, without repeats."""

    modules: tuple[Module, ...]

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        return hash(self.modules)

    @cached_property
    def by_path(self) -> dict[str, Module]:
        return {module.path: module for module in self.modules}

    @cached_property
    def total_parameters(self) -> int:
        """Equals `sum(p.numel() for p in model.parameters())`."""
        return sum(module.parameters for module in self.modules)

    def by_component(self) -> dict[str, int]:
        """Parameters of each component, in order of appearance."""
        counts: dict[str, int] = {}
        for module in self.modules:
            counts[module.component] = counts.get(module.component, 0) + module.parameters
        return counts

    def linears(self) -> Iterator[Module]:
        return (module for module in self.modules if module.kind == "linear")
