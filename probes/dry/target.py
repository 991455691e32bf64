"""The card whose kernels are stood in for: what the libraries ask about it before they choose."""

from __future__ import annotations

import ast
import functools
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from planner.devices import Device, find_device
from planner.spec import RunSpec


@dataclass(frozen=True)
class Target:
    """Compute capability and multiprocessors of the card. Default: an H100/H200 (sm90)."""

    major: int = 9
    minor: int = 0
    multiprocessors: int = 132

    def gemm_4bit_is_fused(self, dtype: torch.dtype, rows: int, out: int, into: int) -> bool:
        """Whether bitsandbytes multiplies without dequantising the weight: its own heuristic,
        read from the installed source (backends/cuda/ops.py needs CUDA to import)."""
        if rows > _CUSTOM_MAX_ROWS or into % 64:
            return False
        props = (self.multiprocessors, self.major, self.minor)
        return bool(_heuristic(props)(0, dtype, rows, out, into))

    @property
    def cublas_workspace_bytes(self) -> int:
        """CublasHandlePool.cpp `parseChosenWorkspaceSize`: 32 MiB from Hopper on, else 8.1 MiB."""
        return 4096 * 8 * 1024 if self.major >= 9 else 4096 * 1024 * 2 + 16 * 1024 * 8

    @property
    def prefers_cudnn_attention(self) -> bool:
        """sdp_utils.cpp `check_prefer_cudnn_attention`: data-centre Hopper and Blackwell."""
        return self.major in (9, 10) and self.minor == 0


def target_of_spec(spec: RunSpec) -> Target:
    """The spec's card where it names one, else the default."""
    return target_of(find_device(spec.device)) if spec.device else Target()


def target_of(device: Device) -> Target:
    """The card as the libraries see it."""
    major, minor = device.compute_capability
    return Target(major, minor, device.sm_count)


_CUSTOM_MAX_ROWS = 1536  # _gemm_4bit_custom_max_m


@functools.cache
def _heuristic(props: tuple[int, int, int]) -> Callable[..., Any]:
    spec = find_spec("bitsandbytes")
    assert spec is not None
    assert spec.origin is not None
    path = Path(spec.origin).parent / "backends" / "cuda" / "ops.py"
    tree = ast.parse(path.read_text(encoding="utf-8"))
    wanted = "_gemm_4bit_use_custom_cuda"
    body: list[ast.stmt] = [
        n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == wanted
    ]
    scope: dict[str, Any] = {
        "functools": functools, "torch": torch, "_GEMM_4BIT_CUSTOM_FLOOR_M": 4,
        "_gpu_dispatch_props": lambda index: props,
    }  # fmt: skip
    exec(compile(ast.Module(body=body, type_ignores=[]), str(path), "exec"), scope)
    return scope[wanted]
