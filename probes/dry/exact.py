"""The dry probe's answer: a mapping for `probe --dry --json`, and what `fit --exact` takes."""

from __future__ import annotations

from typing import Any

from planner.answer import Parameters
from planner.devices import Device
from planner.memory.replay import EMPTY_CACHE, smallest_cap
from planner.spec import RunSpec
from planner.traced import Traced
from probes.dry.events import Trace, stream
from probes.dry.own import OwnCode
from probes.dry.target import target_of, target_of_spec
from probes.dry.terms import instants, peak_operation, terms
from probes.dry.trace import trace

STEPS_UNDER_A_CAP = 3  # the layout of a third step still differs from the second's
RESOLUTION = 400  # the smallest cap is sought to a part in so many


def exact(spec: RunSpec) -> dict[str, Any]:
    """Trace `spec` and answer: all sizes in integer bytes, `seconds` the time the trace took.

    resident_bytes: allocated after loading and adapter set-up; peak_allocated_bytes and
    reserved_bytes: of the training steps; allocator_required_bytes: the smallest cap under which
    loading, training and evaluation complete; live: what fills the peak, largest first.
    Raises InputError for a model that cannot be built.
    """
    return answer(trace(spec, target=target_of_spec(spec)))


def traced_run(spec: RunSpec, device: Device, code: OwnCode | None = None) -> Traced:
    """Trace `spec` for `device`, as `planner.traced` takes it."""
    traced = trace(spec, target=target_of(device), code=code)
    replayed = traced.replayed
    counts = traced.parameters_by_component
    return Traced(
        model_type=traced.model_type,
        parameters=Parameters(sum(counts.values()), traced.trainable_parameters, counts),
        resident_bytes=traced.allocated_after_load_bytes,
        load_peak_bytes=traced.load_peak_bytes,
        peak_allocated_bytes=replayed.peak_allocated_bytes,
        peak_reserved_bytes=replayed.peak_reserved_bytes,
        peak_instant=instants(traced)[1],
        peak_operation=peak_operation(traced),
        eval_peak_bytes=traced.eval_peak_bytes,
        required_bytes=required_bytes(traced),
        paged_bytes=traced.paged_bytes,
        instants=instants(traced)[0],
        terms=terms(traced),
        work=traced.work,
        unknown=traced.unknown_operations,
        seconds=traced.seconds,
    )


def required_bytes(traced: Trace) -> int:
    """The smallest cap under which the whole run completes: bisected over the steps, met with what
    loading leaves, and no less than loading and evaluation hold."""
    steps = steps_required_bytes(traced, traced.replayed.peak_reserved_bytes // RESOLUTION)
    return max(steps, traced.load_peak_bytes, traced.eval_peak_bytes or 0)


def steps_required_bytes(traced: Trace, resolution_bytes: int) -> int:
    """Bisected as the probes do: loaded, the cache emptied, then steps under the cap, and where
    the spec evaluates, the traced steps and a batch of it."""
    runs = [traced.steps_stream(STEPS_UNDER_A_CAP)]
    if traced.evaluation:
        runs.append(stream([*traced.events, *traced.evaluation]))
    before = [*stream(traced.load), EMPTY_CACHE]
    return max(
        smallest_cap(
            run, expandable_segments=traced.expandable, before=before,
            resolution_bytes=resolution_bytes,
        )
        for run in runs
    )  # fmt: skip


def answer(traced: Trace) -> dict[str, Any]:
    """A trace as the mapping above."""
    replayed = traced.replayed
    return {
        "basis": "traced",
        "resident_bytes": traced.allocated_after_load_bytes,
        "load_peak_bytes": traced.load_peak_bytes,
        "peak_allocated_bytes": replayed.peak_allocated_bytes,
        "peak_live_bytes": traced.peak_live_bytes,
        "peak_instant": traced.peak_instant,
        "eval_peak_bytes": traced.eval_peak_bytes,
        "reserved_bytes": replayed.peak_reserved_bytes,
        "allocator_required_bytes": required_bytes(traced),
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
