"""Every figure of an answer as a formula with its numbers filled in, and where it comes from."""

from __future__ import annotations

from planner.answer import Estimate
from planner.calibration import calibration_of
from planner.devices import Device
from planner.memory.terms import Term
from planner.non_torch import non_torch
from planner.units import GIB


def explained(answer: Estimate, device: Device) -> list[Term]:
    """The figures that are not terms of the peak (sums, the allocator, the time), as terms, then
    the peak's own. `bytes` is 0 for what is not a size."""
    return [*_sizes(answer, device), *_times(answer, device), *answer.terms]


def _sizes(answer: Estimate, device: Device) -> list[Term]:
    static = ("parameters", "adapters")
    resident = [term for term in answer.terms if term.category in static]
    low, high = answer.allocator_required_interval_bytes
    whole_low, whole_high = answer.device_required_interval_bytes
    required, outside = answer.allocator_required_bytes, answer.non_torch_bytes
    source = non_torch(device, answer.spec, answer.paged_bytes).source
    return [
        _figure("resident_bytes", answer.resident_bytes, "loaded",
                " + ".join(f"{t.bytes} ({t.name})" for t in resident), "the terms below"),
        _figure("peak_allocated_bytes", answer.peak_allocated_bytes, answer.peak_instant,
                f"the {len(answer.terms)} terms below, at the largest of: "
                + ", ".join(f"{name} {size}" for name, size in answer.instants.items()),
                "the terms below"),
        _figure("allocator_required_bytes", required, "the whole run",
                "the smallest cap under which loading, a first step, the optimizer states and a "
                f"second step pass through the caching allocator: {required} = peak "
                f"{answer.peak_allocated_bytes} + {required - answer.peak_allocated_bytes}; "
                f"between {low} and {high} ({answer.basis})",
                "c10/cuda/CUDACachingAllocator.cpp"),
        _figure("non_torch_bytes", outside, "the whole run",
                f"CUDA context, kernels and paged states of the {answer.device}", source),
        _figure("device_required_bytes", answer.device_required_bytes, "the whole run",
                f"allocator_required_bytes {required} + non_torch_bytes {outside}; between "
                f"{whole_low} and {whole_high}", "their sum"),
        _figure("headroom_bytes", answer.headroom_bytes, "the whole run",
                f"device_total_bytes {answer.device_total_bytes} - upper bound {whole_high}",
                device.total_source),
    ]  # fmt: skip


def _times(answer: Estimate, device: Device) -> list[Term]:
    spec, time = answer.spec, answer.time
    rates = calibration_of(device.id)[0].rates
    peak = device.matmul_flops_per_s(spec.precision) / 1e12
    bandwidth = device.bandwidth_bytes_per_s / 1e9
    tokens = spec.micro_batch_size * spec.sequence_length * spec.gradient_accumulation_steps
    launch_s = rates.launch_s if spec.stack == "stock" else rates.compiled_launch_s
    launches_s = answer.launches_per_step * launch_s
    step = (
        f"max(arithmetic {time.arithmetic_s:.4g} s + memory {time.bytes_s:.4g} s, host "
        f"{time.launches_s:.4g} s) = {answer.step_seconds:.4g} s; "
        f"arithmetic: {answer.flops_per_step:.4g} FLOPs at {rates.matmul_share:.0%} of "
        f"{peak:.4g} TFLOP/s ({spec.precision}, dense; fp32 products at their own rate); memory: "
        f"at {rates.bandwidth_share:.0%} of {bandwidth:.4g} GB/s; host: "
        f"{answer.launches_per_step:.0f} launches at {launch_s * 1e6:.3g} us, and "
        f"{time.launches_s - launches_s:.4g} s of checkpointing's hooks ({time.basis})"
    )
    pace = (
        f"{spec.micro_batch_size} x {spec.sequence_length} x {spec.gradient_accumulation_steps} = "
        f"{tokens} tokens / {answer.step_seconds:.4g} s = {answer.tokens_per_second:.4g}"
    )
    source = device.sources.get(spec.precision, device.sources.get("fp32", ""))
    return [
        _figure("step_seconds", 0, "an optimizer step", step, source),
        _figure("tokens_per_second", 0, "an optimizer step", pace, "the step"),
    ]


def _figure(name: str, size: int, instant: str, formula: str, source: str) -> Term:
    return Term(name, "figure", size, instant, formula, source)


def matching(terms: list[Term], wanted: str) -> list[Term]:
    """The terms a user means: the exact name, else those whose name, group or category has the
    word."""
    from planner.report.groups import group_name

    folded = wanted.lower().replace("-", "_")
    exact = [term for term in terms if term.name.lower() == folded]
    if exact:
        return exact
    word = wanted.lower()
    return [
        term
        for term in terms
        if word in term.name.lower() or word in group_name(term).lower() or folded in term.category
    ]


def size_text(size: int) -> str:
    """'5,769,273,344 B = 5.37 GiB'."""
    return f"{size:,} B = {size / GIB:.2f} GiB"
