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
    return _fast(_dropped, x)(x, seed, p)


def add_dropped(x: Tensor, y: Tensor, seed: Tensor, p: float) -> Tensor:
    """x + dropped(y): the gradient of `dropped`, added to another one."""
    return _fast(_add_dropped, x)(x, y, seed, p)


def _dropped(x: Tensor, seed: Tensor, p: float) -> Tensor:
    return torch.where(keep_mask(x.shape, seed, p), x * (1 / (1 - p)), 0.0).to(x.dtype)


def _add_dropped(x: Tensor, y: Tensor, seed: Tensor, p: float) -> Tensor:
    return x + _dropped(y, seed, p)


def _fast(function: Callable[..., Tensor], x: Tensor) -> Callable[..., Tensor]:
    return _compiled(function) if x.is_cuda else function


@cache
def _compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return torch.compile(function, dynamic=True)
