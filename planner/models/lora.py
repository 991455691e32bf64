"""Which modules an adapter lands on, and what it trains: peft's rule, on the module tree.

Source: peft 0.21 (tuners/tuners_utils.py `check_target_module_exists`,
`_maybe_include_all_linear_layers`; tuners/lora/layer.py for the shapes of A and B).
"""

# Annotations stay objects here: named tuples would compile each string at import.
from math import prod
from typing import NamedTuple

from planner.errors import InputError, Problem, nearest_name
from planner.models.tree import ModelTree, Module
from planner.spec import Lora

ALL_LINEAR = "all-linear"


class LoraModule(NamedTuple):
    """One adapted module. a_shape, b_shape: peft's lora_A and lora_B (for an embedding
    lora_embedding_A and _B, for a convolution the kernel of each)."""

    module: Module
    a_shape: tuple[int, ...]
    b_shape: tuple[int, ...]

    @property
    def parameters(self) -> int:
        """Trainable elements."""
        return prod(self.a_shape) + prod(self.b_shape)


def lora_modules(tree: ModelTree, lora: Lora) -> tuple[LoraModule, ...]:
    """Every module that peft would adapt, in torch's order.

    Raises InputError where a target matches nothing, or a module that peft cannot adapt.
    """
    return tuple(_adapt(module, lora.rank) for module in target_modules(tree, lora.target_modules))


def lora_parameters(tree: ModelTree, lora: Lora) -> int:
    """Trainable parameters of the adapters; equals peft's `get_nb_trainable_parameters()[0]`."""
    return sum(adapted.parameters for adapted in lora_modules(tree, lora))


def target_modules(tree: ModelTree, targets: tuple[str, ...] | str) -> tuple[Module, ...]:
    """The modules whose path is a target or ends in ".target".

    "all-linear" is every Linear but the output layer, vision towers and projectors included.
    peft is content when any one target matches; here each must, and one that matches nothing is
    an error that names the nearest.
    """
    if isinstance(targets, str):
        if targets.lower() != ALL_LINEAR:
            raise InputError(Problem("lora.target_modules", "is not known", targets, ALL_LINEAR))
        return tuple(module for module in tree.linears() if module.component != "lm_head")
    unmatched = [target for target in targets if not _matches_any(tree, target)]
    if unmatched:
        raise InputError([_unknown(tree, target) for target in unmatched])
    matched = tuple(m for m in tree.modules if any(_matches(m.path, t) for t in targets))
    refused = [problem for m in matched if (problem := _refusal(m))]
    if refused:
        raise InputError(refused[:1])
    return matched


def _matches(path: str, target: str) -> bool:
    return path == target or path.endswith(f".{target}")


def _matches_any(tree: ModelTree, target: str) -> bool:
    return any(_matches(module.path, target) for module in tree.modules)


def _unknown(tree: ModelTree, target: str) -> Problem:
    if any(f".{module.path}.".find(f".{target}.") >= 0 for module in tree.modules):
        message = "is a group of modules, which peft cannot adapt"
    else:
        message = "matches no module of the model"
    names = sorted({module.path.rpartition(".")[2] for module in tree.linears()})
    near = nearest_name(target, names)
    return Problem("lora.target_modules", message, target, ", ".join(names), near)


def _refusal(module: Module) -> Problem | None:
    """peft adapts Linear, Embedding and convolutions (and MultiheadAttention, which is rare)."""
    if module.kind in ("linear", "embedding", "conv"):
        return None
    return Problem("lora.target_modules", f"is a {module.kind} module, which peft cannot adapt",
                   module.path)  # fmt: skip


def _adapt(module: Module, rank: int) -> LoraModule:
    shape = module.weight_shape
    if module.kind == "embedding":
        rows, width = shape
        return LoraModule(module, (rank, rows), (width, rank))
    out_features, in_features, *kernel = shape
    ones = (1,) * len(kernel)
    return LoraModule(module, (rank, in_features, *kernel), (out_features, rank, *ones))
