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


_KERNELS = [True]


def use_kernels(wanted: bool) -> None:
    """Whether CUDA runs the Triton kernels (the default) or kernels that torch generates."""
    _KERNELS[0] = wanted


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
    return _drop(p, x.is_cuda)(x.detach().reshape(-1), seed).view(x.shape)


@cache
def _drop(p: float, compiled: bool) -> Callable[[Tensor, Tensor], Tensor]:
    def drop(x: Tensor, seed: Tensor) -> Tensor:
        return torch.where(keep_mask(x.shape, seed, p), x * (1 / (1 - p)), 0.0).to(x.dtype)

    return torch.compile(drop, dynamic=True) if compiled else drop


def up_projection(x: Tensor, a: Tensor, seed: Tensor | None, p: float) -> Tensor:
    """drop(x) A': x (T, K), a (R, K) -> (T, R) in x's dtype."""
    if seed is None or not p:
        return x @ a.t()
    if _in_kernels(x, a.shape[0]):
        from recipes import kernels

        return kernels.up(x.contiguous(), a.contiguous(), seed, p)
    return dropped(x, seed, p) @ a.t()


def add_branch(dx: Tensor, du: Tensor, a: Tensor, seed: Tensor | None, p: float) -> Tensor:
    """dx += drop'(du A) in place: the branch's gradient at its input. dx (T, K), du (T, R)."""
    if seed is None or not p:
        return dx.addmm_(du, a)
    if _in_kernels(dx, a.shape[0]):
        from recipes import kernels

        return kernels.add_branch(dx, du.contiguous(), a.contiguous(), seed, p)
    return dx.add_(dropped(du @ a, seed, p))


def down_gradient(du: Tensor, x: Tensor, seed: Tensor | None, p: float) -> Tensor:
    """du' drop(x): the gradient of A, (R, K) in fp32."""
    if seed is None or not p:
        return (du.t() @ x).float()
    if _in_kernels(x, du.shape[1]):
        from recipes import kernels

        return kernels.down_gradient(du.contiguous(), x.contiguous(), seed, p)
    return (du.t() @ dropped(x, seed, p)).float()


def _in_kernels(x: Tensor, rank: int) -> bool:
    """On CUDA, at the sizes the kernels index in 32 bits."""
    return x.is_cuda and _KERNELS[0] and rank <= 128 and x.numel() < 2**31
