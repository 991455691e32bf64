"""Device memory outside torch's caching allocator: measured where a record exists, else bounded.

The CUDA context grows with the number of multiprocessors and with the kernels that a step loads,
so cards without a record are bounded by the records' bytes per multiprocessor. Never a constant
carried from one card to another. `data/non_torch.json` holds the records with their sources.
"""

# Annotations stay objects here: named tuples would compile each string at import.
import json
import re
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

from planner.devices import Device, find_device
from planner.spec import RunSpec
from planner.units import GIB, MIB

_DATA = Path(__file__).with_name("data") / "non_torch.json"


class NonTorch(NamedTuple):
    """Bytes outside the allocator after the first optimizer step.

    bytes: what to plan with, in [low_bytes, high_bytes]; status "measured" only for a record of
    training steps on this very card and torch version.
    """

    bytes: int
    low_bytes: int
    high_bytes: int
    status: Literal["measured", "bounded"]
    source: str


def non_torch(device: Device, spec: RunSpec, paged_state_bytes: int = 0) -> NonTorch:
    """Context, kernels and managed memory of a run on `device`, beside the caching allocator.

    paged_state_bytes: optimizer states in CUDA managed memory (paged optimizers). torch does not
    count them, the driver does once they have migrated; it may evict them, so `low` leaves them
    out. (H200, r=64 with paged 8-bit states: 1.349 GiB + 0.30 GiB of states read as 1.7.)
    """
    base = _measured(device, spec.versions.torch) or _bounded(device)
    extra = _int8_bytes(device) if spec.quantization == "int8" else (0, 0, 0)
    return NonTorch(
        base.bytes + extra[0] + paged_state_bytes,
        base.low_bytes + extra[1],
        base.high_bytes + extra[2] + paged_state_bytes,
        base.status,
        base.source,
    )


def _measured(device: Device, torch_version: str) -> NonTorch | None:
    for record in _records()["measured"]:
        first, last = (_version(text) for text in record["torch"])
        if record["device"] == device.id and first <= _version(torch_version) <= last:
            expected, low, high = (round(record[k] * MIB) for k in ("mib", "low_mib", "high_mib"))
            return NonTorch(expected, low, high, "measured", record["source"])
    return None


def _bounded(device: Device) -> NonTorch:
    """Bytes a multiprocessor of the records, times this card's.

    low: the least seen on any card. Planned: the most seen on cards before Hopper, for those;
    from Hopper on the H200's after training. high: the most of any training record, or, for an
    architecture with a proven ceiling, that.
    """
    rates = _per_sm()
    hopper_or_later = device.compute_capability >= (9, 0)
    planned, source = rates["hopper" if hopper_or_later else "before_hopper"]
    high = rates["hopper"][0]
    for ceiling in _records()["ceiling"]:
        if ceiling["architecture"] == device.architecture:
            high = ceiling["mib"] * MIB / find_device(ceiling["device"]).sm_count
    count = device.sm_count
    return NonTorch(
        round(planned * count),
        round(rates["least"][0] * count),
        round(high * count),
        "bounded",
        f"bytes a multiprocessor of {source}, times {count}",
    )


def _int8_bytes(device: Device) -> tuple[int, int, int]:
    record = _records()["int8"]
    share = device.sm_count / find_device(record["device"]).sm_count
    expected, low, high = (round(record[k] * MIB * share) for k in ("mib", "low_mib", "high_mib"))
    return expected, low, high


@lru_cache(maxsize=1)
def _per_sm() -> dict[str, tuple[float, str]]:
    """(bytes a multiprocessor, source): the least and most seen before Hopper, and Hopper's."""
    before: list[tuple[float, str]] = []
    hopper: list[tuple[float, str]] = []
    for record in _records()["measured"]:
        device = find_device(record["device"])
        kind = hopper if device.compute_capability >= (9, 0) else before
        kind.append((record["mib"] * MIB / device.sm_count, record["source"]))
    for record in _records()["seen"]:
        device = find_device(record["device"])
        size = (record["in_use_gib"] - record["allocated_gib"]) * GIB - record["idle_mib"] * MIB
        kind = hopper if device.compute_capability >= (9, 0) else before
        kind.append((size / device.sm_count, record["source"]))
    return {
        "least": min(before + hopper),
        "before_hopper": max(before),
        "hopper": max(hopper),
    }


@lru_cache(maxsize=1)
def _records() -> dict[str, Any]:
    records: dict[str, Any] = json.loads(_DATA.read_text(encoding="utf-8"))
    return records


def _version(text: str) -> tuple[int, int]:
    """'2.11.0+cu130' -> (2, 11)."""
    numbers = [int(part) for part in re.findall(r"\d+", text)[:2]]
    return (numbers[0], numbers[1]) if len(numbers) == 2 else (0, 0)
