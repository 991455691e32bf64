"""A trace in the planner's terms: named contributions to the peak, and the peak of each instant."""

from __future__ import annotations

import re
from collections.abc import Sequence

from planner.memory.terms import Term
from probes.dry.events import Event, Trace, live_bytes, live_storages

_NUMBER = re.compile(r"\.\d+(?=\.|$)")
_SOURCE = "traced: transformers' own modelling code on the meta device"
_INSTANTS = {
    "inputs": "forward", "forward": "forward", "backward": "backward", "recompute": "backward",
    "clip": "clipping", "optimizer": "optimizer step", "zero_grad": "optimizer step",
}  # fmt: skip


def terms(traced: Trace) -> tuple[Term, ...]:
    """What is live at the peak by category, module (layers as one), operation, shape and dtype,
    largest first; the last row is what the allocator does not split off. They sum to
    `peak_allocated_bytes`."""
    groups: dict[tuple[str, ...], list[Event]] = {}
    for event in live_storages([*traced.load, *traced.events[: traced.peak_index + 1]]):
        groups.setdefault(_key(traced, event), []).append(event)
    instant = instants(traced)[1]
    found = [_term(key, members, instant) for key, members in groups.items()]
    found.sort(key=lambda term: (-term.bytes, term.name))
    rest = traced.peak_allocated_bytes - sum(term.bytes for term in found)
    remainder = Term(
        "unsplit remainders of blocks", "allocator", rest, instant,
        "allocated blocks less the tensors in them: a remainder up to 1 MiB is not split off",
        "c10/cuda/CUDACachingAllocator.cpp should_split",
    )  # fmt: skip
    return (*found, remainder)


def _key(traced: Trace, event: Event) -> tuple[str, ...]:
    """(name, category, shape, dtype, when): parameters are named by their component."""
    dims, when = " x ".join(map(str, event.shape)) or "1", event.phase
    if event.category == "parameters":
        if ".lora_" in f".{event.module}":
            return (f"adapter ({event.dtype})", "adapters", "", event.dtype, "the whole step")
        component = traced.components.get(event.module, "language_model")
        return (f"{component} ({event.dtype})", "parameters", "", event.dtype, "the whole step")
    if event.category in ("optimizer_states", "workspace"):
        name = "optimizer states" if event.category == "optimizer_states" else event.op
        return (name, event.category, "", event.dtype, "the whole step")
    module = _NUMBER.sub(".*", event.module)
    name = f"{module}: {event.op}" if module else event.op
    return (name, event.category or "temporaries", dims, event.dtype, when)


def _term(key: tuple[str, ...], members: Sequence[Event], instant: str) -> Term:
    name, category, dims, dtype, when = key
    size = sum(event.size_bytes for event in members)
    formula = f"{len(members)} x ({dims}) {dtype}" if dims else f"{len(members)} tensors"
    whole = when == "the whole step"
    return Term(name, category, size, when if whole else instant, formula, _SOURCE, len(members))


def instants(traced: Trace) -> tuple[dict[str, int], str]:
    """Most bytes live in each named instant of the last step, and the instant of the peak."""
    live = live_bytes(traced.load)
    last = traced.events[-1].step
    peaks: dict[str, int] = {}
    for event in traced.events:
        live += event.size_bytes if event.kind == "alloc" else -event.size_bytes
        name = _INSTANTS.get(event.phase)
        if event.step == last and name:
            peaks[name] = max(peaks.get(name, 0), live)
    return peaks, _INSTANTS[traced.events[traced.peak_index].phase]


def peak_operation(traced: Trace) -> str:
    """The operation that reaches the peak and its module, in words."""
    event = traced.events[traced.peak_index]
    where = f" in {event.module}" if event.module else ""
    return f"{event.phase} runs {event.op}{where}"
