"""Seconds of a step: arithmetic, bytes and kernel launches on a device.

A matrix product runs at a share of the card's peak, an element-wise kernel at a share of its memory
bandwidth, and the host issues kernels no faster than one every few microseconds; the GPU's time and
the host's overlap, so the step takes the larger of the two. The shares are fitted to records of the
device where there are any (data/speed.json), else carried over with a wider interval.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from typing import Any

from planner.devices import Device
from planner.memory.ops import Work
from planner.memory.step import StepWork
from planner.spec import RunSpec


@dataclass(frozen=True, slots=True)
class Rates:
    """How much of the datasheet a training step reaches.

    matmul_share, bandwidth_share: of the peak rates; launch_s: host time a kernel; step_s: host
    time a step outside the kernels (data, logging); spread: relative half-width of the interval.
    """

    matmul_share: float
    bandwidth_share: float
    launch_s: float
    step_s: float
    spread: float
    basis: str


@dataclass(frozen=True, slots=True)
class StepTime:
    """Seconds of one optimizer step: by arithmetic, by bytes, by launches, and together."""

    step_s: Any
    arithmetic_s: Any
    bytes_s: Any
    launches_s: Any
    basis: str
    spread: float


def step_time(spec: RunSpec, device: Device, work: StepWork) -> StepTime:
    """Time of one optimizer step on `device`."""
    rates = rates_of(device.id)
    micro = _parts(spec, device, rates, work.micro_batch)
    last = _parts(spec, device, rates, work.optimizer)
    count = spec.gradient_accumulation_steps
    arithmetic, traffic, launches = (
        count * m + o for m, o in zip(micro, last, strict=True)
    )
    gpu = arithmetic + traffic
    step = _larger(gpu, launches) + rates.step_s
    return StepTime(step, arithmetic, traffic, launches, rates.basis, rates.spread)


def _parts(spec: RunSpec, device: Device, rates: Rates, work: Work) -> tuple[Any, Any, Any]:
    precision = spec.precision
    peak = device.matmul_flops_per_s(precision)
    arithmetic = work.flops_16bit / (peak * rates.matmul_share)
    arithmetic = arithmetic + work.flops_fp32 / (device.fp32_flops_per_s * rates.matmul_share)
    traffic = work.traffic_bytes / (device.bandwidth_bytes_per_s * rates.bandwidth_share)
    return arithmetic, traffic, work.launches * rates.launch_s


def _larger(a: Any, b: Any) -> Any:
    if isinstance(a, int | float) and isinstance(b, int | float):
        return max(a, b)
    return a + (b - a) * (b > a)


@lru_cache(maxsize=64)
def rates_of(device_id: str) -> Rates:
    """Fitted rates of a device, or those carried over from the fitted ones."""
    text = files("planner").joinpath("data/speed.json").read_text(encoding="utf-8")
    table = json.loads(text)
    return Rates(**(table.get(device_id) or table["carried_over"]))
