"""The environment a record was measured in."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from probes.driver import driver_version
from probes.records import Environment


def describe(cpu: bool, gpu_index: int | None = None, settings: str = "") -> Environment:
    """This process's versions and device. `settings`: the allocator's, beyond the environment's."""
    allocator = os.environ.get("PYTORCH_ALLOC_CONF") or os.environ.get("PYTORCH_CUDA_ALLOC_CONF")
    common: dict[str, Any] = {
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "peft": version("peft"),
        "accelerate": version("accelerate"),
        "bitsandbytes": _optional("bitsandbytes"),
        "python": platform.python_version(),
        "allocator_settings": ",".join(part for part in (allocator or "", settings) if part),
        "runtime": f"{platform.system()} {platform.release()} {platform.machine()}",
    }
    if cpu:
        return Environment(device="cpu", device_total_bytes=_host_bytes(), **common)
    properties = torch.cuda.get_device_properties(0)
    return Environment(
        device=properties.name,
        device_total_bytes=properties.total_memory,
        driver=driver_version(),
        cuda=torch.version.cuda,
        compute_capability=f"{properties.major}.{properties.minor}",
        gpu_index=gpu_index,
        **common,
    )


def _optional(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _host_bytes() -> int:
    import psutil

    return int(psutil.virtual_memory().total)
