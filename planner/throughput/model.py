"""Seconds of a step: arithmetic, bytes and kernel launches on a device.

A matrix product runs at a share of the card's peak, an element-wise kernel at a share of its memory
bandwidth, and the host issues kernels no faster than one every few tens of microseconds; a tensor
that a checkpointed region saves costs it three calls of Python more. The GPU's time and the host's
overlap, so the step takes the larger of the two. The rates are fitted to records of the device
where there are any, else carried over with a wider interval.
"""

# Annotations stay objects here: named tuples would compile each string at import.
from typing import Any, NamedTuple

from planner.calibration import WIDENING, Rates, calibration_of
from planner.devices import Device
from planner.memory.step import StepWork
from planner.spec import RunSpec


class StepTime(NamedTuple):
    """Seconds of one optimizer step: by arithmetic, by bytes, by the host (launches and hooks),
    and together; fastest_s and slowest_s are the ends of the interval.
    """

    step_s: Any
    arithmetic_s: Any
    bytes_s: Any
    launches_s: Any
    basis: str
    fastest_s: Any
    slowest_s: Any


class Load(NamedTuple):
    """What a step asks of a card, in seconds at the datasheet's rates, and of the host.

    searched_s_per_flop: elements of 8-bit optimizer states over the fp32 rate; launches or
    compiled_launches: the stock stack's or the lean one's; hooks: see planner.memory.work.
    """

    arithmetic_s: Any
    bytes_s: Any
    searched_s_per_flop: Any
    launches: Any
    compiled_launches: Any
    hooks: Any


def load_of(spec: RunSpec, device: Device, work: StepWork) -> Load:
    """One optimizer step's load, all micro batches together."""
    peak = device.matmul_flops_per_s(spec.precision)
    count = spec.gradient_accumulation_steps

    def total(counter: str) -> Any:
        return count * getattr(work.micro_batch, counter) + getattr(work.optimizer, counter)

    launches = total("launches")
    lean = spec.stack == "lean"
    return Load(
        total("flops_16bit") / peak + total("flops_fp32") / device.fp32_flops_per_s,
        total("traffic_bytes") / device.bandwidth_bytes_per_s,
        total("quantized") / device.fp32_flops_per_s,
        0 if lean else launches,
        launches if lean else 0,
        total("hooks"),
    )


def step_time(spec: RunSpec, device: Device, work: StepWork) -> StepTime:
    """Time of one optimizer step on `device`."""
    calibration, own = calibration_of(device.id)
    rates = calibration.rates
    load = load_of(spec, device, work)
    arithmetic, traffic, launches = parts(rates, load)
    gpu = arithmetic + traffic
    widening = 1.0 if own else WIDENING
    gpu_low, gpu_high = _widened(rates.gpu_range, widening)
    host_low, host_high = _widened(rates.host_range, widening)
    return StepTime(
        _larger(gpu, launches), arithmetic, traffic, launches, "calibrated" if own else "analytic",
        _larger(gpu * gpu_low, launches * host_low), _larger(gpu * gpu_high, launches * host_high),
    )  # fmt: skip


def _widened(range_: tuple[float, float], factor: float) -> tuple[float, float]:
    low, high = range_
    return max(0.1, 1 + (low - 1) * factor), 1 + (high - 1) * factor


def _larger(a: Any, b: Any) -> Any:
    """max of numbers, element-wise of arrays."""
    return a + (b - a) * (b > a)


def parts(rates: Rates, load: Load) -> tuple[Any, Any, Any]:
    """(arithmetic, bytes, host) in seconds."""
    host = load.launches * rates.launch_s + load.compiled_launches * rates.compiled_launch_s
    return (
        load.arithmetic_s / rates.matmul_share + load.searched_s_per_flop * rates.search_flops,
        load.bytes_s / rates.bandwidth_share,
        host + load.hooks * rates.hook_s,
    )
