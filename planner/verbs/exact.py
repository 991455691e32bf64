"""`vramwise fit --exact`: the real modelling code traced on the meta device, as a whole answer."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from planner.errors import MissingExtraError
from planner.estimate import Estimate, device_of, estimate
from planner.interval import requirement_interval
from planner.memory.terms import Term
from planner.models.registry import load_model
from planner.spec import RunSpec
from planner.verdict import verdict

_SOURCE = "traced: transformers' own modelling code on the meta device"


def exact_estimate(spec: RunSpec) -> Estimate:
    """`estimate(spec)` with its memory traced instead of modelled; the time stays the model's.

    Raises MissingExtraError without torch, UnsupportedError for a family without a step program
    (`vramwise probe --dry` traces any model).
    """
    modelled = estimate(spec)
    traced = _trace(spec)
    required = int(traced["allocator_required_bytes"])
    band = requirement_interval(spec, load_model(spec.model), required)
    outside_low = (
        modelled.device_required_interval_bytes[0] - (modelled.allocator_required_interval_bytes[0])
    )
    outside_high = (
        modelled.device_required_interval_bytes[1] - (modelled.allocator_required_interval_bytes[1])
    )
    low, high = band.low_bytes + outside_low, band.high_bytes + outside_high
    total = modelled.device_total_bytes
    names = ("resident_bytes", "load_peak_bytes", "peak_allocated_bytes", "peak_instant",
             "eval_peak_bytes", "allocator_required_bytes")  # fmt: skip
    return replace(
        modelled,
        **{name: traced[name] for name in names},
        verdict=verdict(low, high, total),
        allocator_required_interval_bytes=(band.low_bytes, band.high_bytes),
        device_required_bytes=required + modelled.non_torch_bytes,
        device_required_interval_bytes=(low, high),
        headroom_bytes=total - high,
        peak_reserved_bytes=traced["reserved_bytes"],
        terms=_terms(traced, traced["peak_allocated_bytes"]),
        basis="traced",
    )


def _trace(spec: RunSpec) -> dict[str, Any]:
    """Traced for the spec's own card, whose kernels and workspaces differ from another's."""
    try:
        from probes.dry.exact import answer
        from probes.dry.target import Target
        from probes.dry.trace import trace
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing in ("planner", "probes", "recipes"):
            raise
        raise MissingExtraError("fit --exact", "train", missing) from None
    device = device_of(spec)
    card = Target(*device.compute_capability, device.sm_count)
    return answer(trace(spec, target=card))


def _terms(traced: dict[str, Any], peak_bytes: int) -> tuple[Term, ...]:
    """The trace's live rows as terms; what the allocator does not split off makes up the sum."""
    instant = str(traced["peak_instant"])
    terms = [
        Term(f"{row['module']}: {row['operation']}", row["category"], row["bytes"], instant,
             f"{row['bytes']} B traced", _SOURCE)
        for row in traced["live"]
    ]  # fmt: skip
    rest = peak_bytes - sum(term.bytes for term in terms)
    if rest:
        terms.append(Term("block remainders", "temporaries", rest, instant,
                          "allocated less live bytes", _SOURCE))  # fmt: skip
    return tuple(terms)
