"""A traced run as an answer: the memory of real modelling code, in the contract of `fit`.

`Traced` is what a trace hands over, without torch; `traced_estimate` holds it against a card.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from typing import Any

from planner.answer import Estimate, Parameters
from planner.devices import Device
from planner.dtypes import DType
from planner.host import HostNeeds, host_memory
from planner.interval import Interval
from planner.memory.step import StepWork
from planner.memory.terms import Term
from planner.non_torch import non_torch
from planner.spec import RunSpec
from planner.throughput.model import step_time
from planner.verdict import verdict, worst

UNKNOWN_FAMILY_WIDENING = 2.0  # families and stacks without a record: the band, times this


@dataclass(frozen=True, slots=True)
class Traced:
    """Memory of a traced run, sizes in bytes; names as in `Estimate`.

    required_bytes: the smallest cap under which loading, steps and evaluation complete, by
    bisection; terms: sum to peak_allocated_bytes; unknown: operations not known for certain.
    """

    model_type: str
    parameters: Parameters
    resident_bytes: int
    load_peak_bytes: int
    peak_allocated_bytes: int
    peak_reserved_bytes: int
    peak_instant: str
    peak_operation: str
    eval_peak_bytes: int | None
    required_bytes: int
    paged_bytes: int
    instants: dict[str, int]
    terms: tuple[Term, ...]
    work: StepWork
    unknown: tuple[str, ...]
    seconds: float


def traced_estimate(spec: RunSpec, device: Device, model_id: str, traced: Traced) -> Estimate:
    """The answer: memory from the trace, seconds from the planner's model of the traced work."""
    band = traced_interval(spec, traced.model_type, traced.required_bytes)
    outside = non_torch(device, spec, traced.paged_bytes)
    total = spec.device_memory or device.total_bytes
    low, high = band.low_bytes + outside.low_bytes, band.high_bytes + outside.high_bytes
    speed = step_time(spec, device, traced.work)
    count, work = spec.gradient_accumulation_steps, traced.work
    tokens = spec.micro_batch_size * spec.sequence_length * count
    trained = traced.parameters.trainable
    itemsize = DType(spec.weights_dtype).itemsize if spec.method == "full" else 4
    # The trace keeps no list of parameters: what loading converts is left out.
    needs = HostNeeds(0, traced.paged_bytes, 0, trained * itemsize, ())
    host = host_memory(spec, device, needs)
    fitting = verdict(low, high, total)
    return Estimate(
        verdict=worst(fitting, host.verdict),
        model=model_id,
        device=device.label,
        parameters=traced.parameters,
        resident_bytes=traced.resident_bytes,
        load_peak_bytes=traced.load_peak_bytes,
        peak_allocated_bytes=traced.peak_allocated_bytes,
        peak_reserved_bytes=traced.peak_reserved_bytes,
        peak_instant=traced.peak_instant,
        eval_peak_bytes=traced.eval_peak_bytes,
        host_bytes=host.bytes,
        host_low_bytes=host.low_bytes,
        host_total_bytes=host.total_bytes,
        host_verdict=host.verdict,
        host_terms=host.terms,
        device_verdict=fitting,
        allocator_required_bytes=traced.required_bytes,
        allocator_required_interval_bytes=(band.low_bytes, band.high_bytes),
        non_torch_bytes=outside.bytes,
        device_required_bytes=traced.required_bytes + outside.bytes,
        device_required_interval_bytes=(low, high),
        device_total_bytes=total,
        headroom_bytes=total - high,
        paged_bytes=traced.paged_bytes,
        step_seconds=speed.step_s,
        step_seconds_interval=(
            speed.fastest_s, speed.slowest_s
        ),
        tokens_per_second=tokens / speed.step_s,
        time=speed,
        flops_per_step=count * (work.micro_batch.flops_16bit + work.micro_batch.flops_fp32),
        launches_per_step=count * work.micro_batch.launches + work.optimizer.launches,
        instants=traced.instants,
        terms=traced.terms,
        basis="traced",
        speed_basis=speed.basis,
        notes=(
            f"traced in {traced.seconds:.1f} s: transformers' own modelling code on the meta "
            f"device; at the peak {traced.peak_operation}",
            *band.notes,
            *(f"not known for certain: {name}" for name in traced.unknown),
        ),
        spec=spec,
    )  # fmt: skip


def traced_interval(spec: RunSpec, model_type: str, required_bytes: int) -> Interval:
    """The band around a traced requirement: the worst residues of the records that were traced
    (`python -m probes.dry.accuracy --band`), wider for a family or stack without one."""
    known = _bands()
    band = known["stacks"].get(spec.stack)
    notes: tuple[str, ...] = ()
    factor = 1.0
    if band is None or model_type not in known["model_types"]:
        factor = UNKNOWN_FAMILY_WIDENING
        notes = (f"no record of {model_type} on the {spec.stack} stack: the band is widened",)
    if band is None:
        stacks = known["stacks"].values()
        band = {"low": min(s["low"] for s in stacks), "high": max(s["high"] for s in stacks)}
    return Interval(
        int(required_bytes * (1 + factor * band["low"])),
        int(required_bytes * (1 + factor * band["high"])),
        "traced", notes,
    )  # fmt: skip


@lru_cache(maxsize=1)
def _bands() -> dict[str, Any]:
    text = files("planner").joinpath("data/traced.json").read_text(encoding="utf-8")
    bands: dict[str, Any] = json.loads(text)
    return bands
