"""Which category each storage belongs to, told from when it lives.

Parameters, inputs, gradients, optimizer states and workspaces are known when they are made. The
rest follows: what a forward (or a recomputation) makes and its backward frees is a saved
activation, a floating tensor as wide as the vocabulary is logits, and what its own section frees
is temporary.
"""

from __future__ import annotations

from collections.abc import Sequence

from probes.dry.events import Category, Event

_FORWARD = ("forward", "recompute", "evaluate")
_FLOATING = ("float32", "bfloat16", "float16")


def categorise(events: Sequence[Event], vocabulary: int) -> None:
    """Fill in the category of every allocation of the steps, in place, and of its release."""
    made: dict[int, Event] = {}
    for event in events:
        if event.kind == "alloc":
            made[event.storage_id] = event
        elif event.kind == "free":
            start = made.pop(event.storage_id, None)
            if start is not None:
                start.category = start.category or _category(start, event, vocabulary)
                event.category = start.category
    for event in made.values():
        event.category = event.category or _kept(event, vocabulary)


def _category(start: Event, end: Event, vocabulary: int) -> Category:
    if vocabulary in start.shape[-1:] and start.dtype in _FLOATING and len(start.shape) > 1:
        return "logits"
    if start.phase in _FORWARD and end.section != start.section:
        return "saved_activations"
    return "temporaries"


def _kept(event: Event, vocabulary: int) -> Category:
    if event.phase == "optimizer":
        return "optimizer_states"
    return "temporaries"
