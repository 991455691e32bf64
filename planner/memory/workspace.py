"""Library workspaces that live in torch's allocator for the rest of the process.

aten/src/ATen/cuda/CublasHandlePool.cpp: the first product of each cuBLAS handle takes a workspace,
32 MiB on compute capability 9 and 10, else 4,096 KiB twice and 16 KiB eight times. Handles belong
to threads: a training step has two, the caller's and autograd's.
"""

from __future__ import annotations

from planner.units import KIB, MIB

HANDLES_TRAINING = 2
HANDLES_EVALUATION = 1


def cublas_workspace_bytes(compute_capability: tuple[int, int]) -> int:
    """Bytes of one handle's workspace."""
    if compute_capability[0] in (9, 10):
        return 32 * MIB
    return 2 * 4096 * KIB + 8 * 16 * KIB
