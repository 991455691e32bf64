"""Dropout whose mask is a function of (seed, element index): nothing is stored for backward, a
recomputed layer draws the same mask, and a resumed run continues bit for bit.

The mask of element i: a 32-bit integer hash ("lowbias32", Chris Wellons, hash-prospector) of the
index stepped by the golden ratio from the seed, kept where it is at or above p * 2^32. Written in
int32 tensor arithmetic (which wraps), so that eager, compiled, CPU and CUDA draw the same mask.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

_GOLDEN = -1640531527  # 0x9E3779B9 as int32
_MIX_1 = 2146121005  # 0x7FEB352D
_MIX_2 = -2073254261  # 0x846CA68B as int32


def keep_mask(shape: torch.Size, seed: Tensor, p: float) -> Tensor:
    """Bool tensor of `shape`, True with probability 1 - p. seed: int32, 0-d, on the device."""
    index = torch.arange(shape.numel(), dtype=torch.int32, device=seed.device).view(shape)
    x = index * _GOLDEN + seed
    x = (x ^ ((x >> 16) & 0xFFFF)) * _MIX_1
    x = (x ^ ((x >> 15) & 0x1FFFF)) * _MIX_2
    x = x ^ ((x >> 16) & 0xFFFF)
    return x >= int(p * 2**32) - 2**31


def dropped(x: Tensor, seed: Tensor, p: float) -> Tensor:
    """x with elements zeroed with probability p and the rest scaled by 1/(1-p); x's dtype."""
    return _kernels(p, x.is_cuda)[0](x.reshape(-1), seed).view(x.shape)


def add_dropped(x: Tensor, y: Tensor, seed: Tensor, p: float) -> Tensor:
    """x + dropped(y): the gradient of `dropped`, added to another one."""
    return _kernels(p, x.is_cuda)[1](x.reshape(-1), y.reshape(-1), seed).view(x.shape)


@cache
def _kernels(p: float, compiled: bool) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """(drop, add) over flat tensors for one p: one generated kernel each where compiled."""

    def drop(x: Tensor, seed: Tensor) -> Tensor:
        return torch.where(keep_mask(x.shape, seed, p), x * (1 / (1 - p)), 0.0).to(x.dtype)

    def add(x: Tensor, y: Tensor, seed: Tensor) -> Tensor:
        return x + drop(y, seed)

    if not compiled:
        return drop, add
    return torch.compile(drop, dynamic=True), torch.compile(add, dynamic=True)
