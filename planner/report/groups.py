"""The many terms of a peak as the few that a person wants to read. Computes no byte of its own:
each group is a sum of terms, and the groups sum to the peak."""

# Annotations stay objects here: named tuples would compile each string at import.
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from planner.memory.terms import Term

_WEIGHTS = {
    "embeddings": "embeddings", "language_model": "language model", "lm_head": "output layer",
    "vision_tower": "vision tower", "projector": "projector", "image_tokenizer": "image tokenizer",
}  # fmt: skip
_TITLES = {
    "parameters": "weights",
    "adapters": "adapters",
    "gradients": "gradients",
    "optimizer_states": "optimizer states",
    "saved_activations": "kept for backward",
    "logits": "logits and loss",
    "temporaries": "temporaries",
    "inputs": "inputs",
    "workspace": "cuBLAS workspaces",
}
_PARTS = (
    ("vision tower", ("vision_tower", "vision_model", "visual")),
    ("image tokenizer", ("vqmodel",)),
    ("projector", ("multi_modal_projector", "merger", "projector")),
    ("attention", ("self_attn", "attn", "rotary_emb")),
    ("MLP", ("mlp",)),
    ("output layer", ("lm_head",)),
    ("loss", ("loss",)),
)
REST = "everything else"


class Group(NamedTuple):
    """Terms of one kind. `terms` are sorted, largest first."""

    name: str
    bytes: int
    terms: tuple[Term, ...]


def groups(terms: Iterable[Term], most: int = 10, least_share: float = 0.005) -> list[Group]:
    """Terms by category and part of the model, largest first; what is small goes into one last
    group, and no more than `most` are returned."""
    members: dict[str, list[Term]] = {}
    for term in terms:
        members.setdefault(group_name(term), []).append(term)
    found = sorted((_group(name, terms) for name, terms in members.items()),
                   key=lambda group: (-group.bytes, group.name))  # fmt: skip
    least = least_share * sum(group.bytes for group in found)
    shown = [group for group in found[: most - 1] if group.bytes >= least]
    rest = [term for group in found[len(shown) :] for term in group.terms]
    return [*shown, _group(REST, rest)] if rest else shown


def group_name(term: Term) -> str:
    """'weights: language model', 'kept for backward: MLP', 'optimizer states'."""
    title = _TITLES.get(term.category, term.category)
    if term.category == "parameters":
        component = term.name.partition(" (")[0]
        return f"{title}: {_WEIGHTS.get(component, component)}"
    if term.category in ("saved_activations", "temporaries"):
        return f"{title}: {_part(term.name)}"
    return title


def _part(name: str) -> str:
    path = name.partition(":")[0].split(".")
    for title, words in _PARTS:
        if any(word in path for word in words):
            return title
    return "residual stream, norms"


def _group(name: str, terms: Sequence[Term]) -> Group:
    ordered = tuple(sorted(terms, key=lambda term: (-term.bytes, term.name)))
    return Group(name, sum(term.bytes for term in ordered), ordered)
