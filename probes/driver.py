"""What lies outside torch's allocator: the card as NVML sees it, and the host."""

from __future__ import annotations

import os
import resource
import time
from dataclasses import dataclass

from planner.errors import VramwiseError
from planner.units import MIB, format_gib
from probes.records import Driver

# An idle card's own bookkeeping stays below this; more is somebody's load.
OTHERS_ALLOWED_BYTES = 1024 * MIB


class BusyDeviceError(VramwiseError):
    """Another tenant uses the card; a measurement beside it would be neither's truth."""


@dataclass(frozen=True, slots=True)
class Card:
    """One GPU as NVML numbers them."""

    index: int
    name: str
    total_bytes: int
    used_bytes: int
    utilization_percent: int
    process_ids: tuple[int, ...]


def find_cards() -> list[Card]:
    """Every NVIDIA card of this host, [] where NVML or the driver is missing."""
    try:
        import pynvml
    except ModuleNotFoundError:
        return []
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return []
    return [_card(index) for index in range(pynvml.nvmlDeviceGetCount())]


def _card(index: int) -> Card:
    import pynvml

    handle = pynvml.nvmlDeviceGetHandleByIndex(index)
    memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
    try:
        busy = int(pynvml.nvmlDeviceGetUtilizationRates(handle).gpu)
        processes = [p.pid for p in pynvml.nvmlDeviceGetComputeRunningProcesses(handle)]
    except pynvml.NVMLError:
        busy, processes = 0, []
    name = pynvml.nvmlDeviceGetName(handle)
    return Card(index, name if isinstance(name, str) else name.decode(), int(memory.total),
                int(memory.used), busy, tuple(processes))  # fmt: skip


def driver_version() -> str | None:
    """The NVIDIA driver's version, None without one."""
    if not find_cards():
        return None
    import pynvml

    version = pynvml.nvmlSystemGetDriverVersion()
    return version if isinstance(version, str) else version.decode()


def refuse_if_busy(card: Card, patience_s: float = 10.0) -> Card:
    """The card, as it is when nobody else computes on, or fills, it.

    A process that has just ended may still be listed: it gets `patience_s`. Raises
    BusyDeviceError.
    """
    deadline = time.monotonic() + patience_s
    while card.used_bytes > OTHERS_ALLOWED_BYTES or card.process_ids:
        if time.monotonic() > deadline:
            raise BusyDeviceError(
                f"GPU {card.index} ({card.name}) is in use: {format_gib(card.used_bytes)} taken, "
                f"{len(card.process_ids)} processes {list(card.process_ids)}, "
                f"{card.utilization_percent} % busy; --force measures beside it"
            )
        time.sleep(0.5)
        card = _card(card.index)
    return card


def driver_use(index: int, others_used_bytes: int, reserved_bytes: int) -> Driver | None:
    """The card now, beside what was used before this process's context (`others_used_bytes`) and
    what torch reserves. None without NVML."""
    cards = {card.index: card for card in find_cards()}
    if index not in cards:
        return None
    used = cards[index].used_bytes
    return Driver(
        used_bytes=used,
        others_used_bytes=others_used_bytes,
        process_used_bytes=_process_bytes(index),
        non_torch_bytes=used - others_used_bytes - reserved_bytes,
    )


def _process_bytes(index: int) -> int | None:
    """This process's bytes by NVML; None where process ids are hidden (containers)."""
    import pynvml

    handle = pynvml.nvmlDeviceGetHandleByIndex(index)
    try:
        processes = pynvml.nvmlDeviceGetComputeRunningProcesses(handle)
    except pynvml.NVMLError:
        return None
    found = [p.usedGpuMemory for p in processes if p.pid == os.getpid()]
    return int(found[0]) if found and found[0] is not None else None


def host_rss_bytes() -> tuple[int, int]:
    """(resident set now, its peak since the process began)."""
    import psutil

    now = int(psutil.Process().memory_info().rss)
    # ru_maxrss is KiB on Linux (getrusage(2)).
    return now, max(now, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
