"""The dry probe's answer as one mapping, for `probe --dry --json` and `fit --exact`."""

from __future__ import annotations

from typing import Any

from planner.memory.replay import smallest_cap
from planner.spec import RunSpec
from probes.dry.events import Trace
from probes.dry.trace import trace


def exact(spec: RunSpec) -> dict[str, Any]:
    """Trace `spec` and answer: all sizes in integer bytes, `seconds` the time the trace took.

    resident_bytes: allocated after loading and adapter set-up; peak_allocated_bytes and
    reserved_bytes: of the training steps; allocator_required_bytes: the smallest cap under which
    loading, training and evaluation complete; live: what fills the peak, largest first.
    Raises InputError for a model that cannot be built.
    """
    return answer(trace(spec))


def answer(traced: Trace) -> dict[str, Any]:
    """A trace as the mapping above."""
    replayed = traced.replayed
    required = smallest_cap(traced.whole_stream(), expandable_segments=traced.expandable)
    return {
        "basis": "traced",
        "resident_bytes": traced.allocated_after_load_bytes,
        "load_peak_bytes": traced.load_peak_bytes,
        "peak_allocated_bytes": replayed.peak_allocated_bytes,
        "peak_live_bytes": traced.peak_live_bytes,
        "peak_instant": traced.peak_instant,
        "eval_peak_bytes": traced.eval_peak_bytes,
        "reserved_bytes": replayed.peak_reserved_bytes,
        "allocator_required_bytes": required,
        "total_parameters": traced.total_parameters,
        "trainable_parameters": traced.trainable_parameters,
        "live": [
            {"category": row.category, "module": row.module, "operation": row.operation,
             "bytes": row.size_bytes}
            for row in traced.live_at_peak()
        ],
        "unknown_operations": list(traced.unknown_operations),
        "seconds": round(traced.seconds, 2),
    }  # fmt: skip
