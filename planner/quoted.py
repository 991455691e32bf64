"""Which configurations land on a number that someone quotes: "it takes 79 GB"."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

from planner.errors import VramwiseError
from planner.estimate import check, device_of, requirement
from planner.levers import Change, apply
from planner.memory.program import run
from planner.memory.workspace import HANDLES_TRAINING, cublas_workspace_bytes
from planner.models.registry import load_model
from planner.non_torch import non_torch
from planner.spec import RunSpec

METHODS: tuple[dict[str, Any], ...] = (
    {"method": "full", "quantization": "none", "optimizer": "adamw_torch_fused"},
    {"method": "full", "quantization": "none", "optimizer": "adamw_8bit"},
    {"method": "lora", "quantization": "none"},
    {"method": "lora", "quantization": "int8"},
    {"method": "lora", "quantization": "nf4"},
)
AXES: dict[str, tuple[Any, ...]] = {
    "gradient_checkpointing": (True, False),
    "sequence_length": (512, 1024, 2048, 4096),
    "micro_batch_size": (1, 2, 4, 8, 16, 32),
}
LIVE = "live"
_REQUIRED_MOST = 1.25  # the allocator's share above the peak: no measured run had more than 1.13


@dataclass(frozen=True, slots=True)
class Landing:
    """A configuration whose figure `meter` is within the tolerance of the quoted bytes."""

    flags: str
    spec: RunSpec
    meter: str
    bytes: int
    deviation: float


def landings(
    spec: RunSpec, quoted_bytes: int, tolerance: float = 0.03, fixed: Collection[str] = ()
) -> list[Landing]:
    """Configurations near `quoted_bytes` by one of three meters (peak allocated, the allocator's
    requirement, the device's), nearest first. `fixed` fields keep the spec's values."""
    found: list[Landing] = []
    for fields in _settings(spec, fixed):
        batches = AXES["micro_batch_size"] if "micro_batch_size" not in fixed else (
            spec.micro_batch_size,)  # fmt: skip
        for batch in batches:
            change = Change({**fields, "micro_batch_size": batch})
            try:
                figures = _figures(apply(spec, change.fields), quoted_bytes, tolerance)
            except VramwiseError:  # not possible for this model: it cannot be what was quoted
                break
            for meter, size in figures.items():
                if meter == LIVE:
                    continue
                deviation = size / quoted_bytes - 1
                if abs(deviation) <= tolerance:
                    landed = apply(spec, change.fields)
                    found.append(Landing(change.flags, landed, meter, size, deviation))
            if figures[LIVE] > quoted_bytes * (1 + tolerance):
                break  # a larger batch needs more
    return sorted(found, key=lambda landing: abs(landing.deviation))


def _settings(spec: RunSpec, fixed: Collection[str]) -> Iterator[dict[str, Any]]:
    names = [name for name in AXES if name not in fixed and name != "micro_batch_size"]
    told: set[tuple[Any, ...]] = set()
    for method in METHODS:
        free = {name: value for name, value in method.items() if name not in fixed}
        if any(name in fixed and getattr(spec, name) != method[name]
               for name in ("method", "quantization") if name in method):  # fmt: skip
            continue
        for values in product(*(AXES[name] for name in names)):
            fields = {**free, **dict(zip(names, values, strict=True))}
            key = tuple(sorted((name, str(value)) for name, value in fields.items()))
            if key not in told:
                told.add(key)
                yield fields


def _figures(spec: RunSpec, quoted_bytes: int, tolerance: float) -> dict[str, int]:
    """The figures by meter. Far from the quoted bytes only the sum of live bytes is known, which
    the allocator never undercuts by more than a rounding."""
    model, device = load_model(spec.model), device_of(spec)
    check(spec, model)
    program = run(spec, model)
    workspace = cublas_workspace_bytes(device.compute_capability)
    live = int(program.static_bytes + program.peak.peak_bytes + HANDLES_TRAINING * workspace)
    outside = non_torch(device, spec, program.states.paged_bytes).bytes
    too_small = live * _REQUIRED_MOST + outside < quoted_bytes * (1 - tolerance)
    if too_small or live > quoted_bytes * (1 + tolerance):
        return {LIVE: live}
    needed = requirement(spec, model, program, workspace)
    return {
        LIVE: live,
        "peak allocated": needed.peak_allocated_bytes,
        "allocator required": needed.required_bytes,
        "device required": needed.required_bytes + outside,
    }
