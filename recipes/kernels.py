"""Triton kernels of the adapter's branch: dropout made where its operand is read, never stored.

Shapes: x (T, K) rows of activations, A (R, K) and du (T, R) with a small rank R. All three read or
write the wide operand once. Imported on CUDA only; `recipes.dropout` holds the same arithmetic in
torch, which the tests compare with.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_RANK = 128
_BLOCK_T, _BLOCK_K = 64, 128
_SPLITS = 4


def up(x: Tensor, a: Tensor, seed: Tensor, p: float) -> Tensor:
    """drop(x) A' of shape (T, R) in x's dtype; sums in fp32."""
    rows, width = x.shape
    rank = a.shape[0]
    parts = torch.empty((_SPLITS, rows, rank), dtype=torch.float32, device=x.device)
    steps = triton.cdiv(triton.cdiv(width, _BLOCK_K), _SPLITS)
    grid = (triton.cdiv(rows, _BLOCK_T), _SPLITS)
    _up[grid](x, a, parts, seed, rows, width, rank, *_rule(p), STEPS=steps, **_blocks(rank))
    return parts.sum(0).to(x.dtype)


def add_branch(dx: Tensor, du: Tensor, a: Tensor, seed: Tensor, p: float) -> Tensor:
    """dx += drop'(du A), in place: dx (T, K), du (T, R)."""
    rows, width = dx.shape
    rank = a.shape[0]
    grid = (triton.cdiv(rows, _BLOCK_T), triton.cdiv(width, _BLOCK_K))
    _add_branch[grid](dx, du, a, seed, rows, width, rank, *_rule(p), **_blocks(rank))
    return dx


def down_gradient(du: Tensor, x: Tensor, seed: Tensor, p: float) -> Tensor:
    """du' drop(x) of shape (R, K) in fp32."""
    rows, width = x.shape
    rank = du.shape[1]
    blocks = triton.cdiv(rows, _BLOCK_T)
    steps = max(4, triton.next_power_of_2(triton.cdiv(blocks, 32)))  # few values: few compilations
    splits = triton.cdiv(blocks, steps)
    parts = torch.empty((splits, rank, width), dtype=torch.float32, device=x.device)
    grid = (triton.cdiv(width, _BLOCK_K), splits)
    _down_gradient[grid](du, x, parts, seed, rows, width, rank, *_rule(p), STEPS=steps,
                         **_blocks(rank))  # fmt: skip
    return parts.sum(0)


def _rule(p: float) -> tuple[int, float]:
    """What is kept: random int32 from the threshold on; and its scale."""
    return int(p * 2**32) - 2**31, 1 / (1 - p)


def _blocks(rank: int) -> dict[str, int]:
    """Sizes of the tiles; a rank is padded to what tl.dot takes."""
    padded = max(16, triton.next_power_of_2(rank))
    return {"BLOCK_T": _BLOCK_T, "BLOCK_K": _BLOCK_K, "RANK": padded}


@triton.jit
def _kept(index, seed, threshold):  # type: ignore[no-untyped-def]
    x = index * -1640531527 + seed
    x = (x ^ ((x >> 16) & 0xFFFF)) * 2146121005
    x = (x ^ ((x >> 15) & 0x1FFFF)) * -2073254261
    x = x ^ ((x >> 16) & 0xFFFF)
    return x >= threshold


@triton.jit
def _dropped_tile(x_ptr, seed, t, k, rows, width, threshold, scale):  # type: ignore[no-untyped-def]
    inside = (t[:, None] < rows) & (k[None, :] < width)
    index = t[:, None] * width + k[None, :]
    x = tl.load(x_ptr + index, mask=inside, other=0.0)
    kept = _kept(index, seed, threshold)
    return tl.where(kept, x.to(tl.float32) * scale, 0.0).to(x_ptr.dtype.element_ty)


@triton.jit  # type: ignore[untyped-decorator]
def _up(  # type: ignore[no-untyped-def]
    x_ptr, a_ptr, out_ptr, seed_ptr, rows, width, rank, threshold, scale,
    STEPS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    part = tl.program_id(1)
    r = tl.arange(0, RANK)
    seed = tl.load(seed_ptr)
    total = tl.zeros((BLOCK_T, RANK), dtype=tl.float32)
    for step in range(STEPS):
        k = (part * STEPS + step) * BLOCK_K + tl.arange(0, BLOCK_K)
        tile = _dropped_tile(x_ptr, seed, t, k, rows, width, threshold, scale)
        inside = (r[None, :] < rank) & (k[:, None] < width)
        a = tl.load(a_ptr + r[None, :] * width + k[:, None], mask=inside, other=0.0)
        total += tl.dot(tile, a, input_precision="ieee")
    out = out_ptr + part * rows * rank + t[:, None] * rank + r[None, :]
    tl.store(out, total, mask=(t[:, None] < rows) & (r[None, :] < rank))


@triton.jit  # type: ignore[untyped-decorator]
def _add_branch(  # type: ignore[no-untyped-def]
    dx_ptr, du_ptr, a_ptr, seed_ptr, rows, width, rank, threshold, scale,
    BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    r = tl.arange(0, RANK)
    du = tl.load(du_ptr + t[:, None] * rank + r[None, :],
                 mask=(t[:, None] < rows) & (r[None, :] < rank), other=0.0)  # fmt: skip
    a = tl.load(a_ptr + r[:, None] * width + k[None, :],
                mask=(r[:, None] < rank) & (k[None, :] < width), other=0.0)  # fmt: skip
    branch = tl.dot(du, a, input_precision="ieee")
    inside = (t[:, None] < rows) & (k[None, :] < width)
    index = t[:, None] * width + k[None, :]
    kept = _kept(index, tl.load(seed_ptr), threshold)
    dx = tl.load(dx_ptr + index, mask=inside, other=0.0)
    added = dx.to(tl.float32) + tl.where(kept, branch * scale, 0.0)
    tl.store(dx_ptr + index, added.to(dx_ptr.dtype.element_ty), mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _down_gradient(  # type: ignore[no-untyped-def]
    du_ptr, x_ptr, out_ptr, seed_ptr, rows, width, rank, threshold, scale,
    STEPS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    part = tl.program_id(1)
    r = tl.arange(0, RANK)
    seed = tl.load(seed_ptr)
    total = tl.zeros((RANK, BLOCK_K), dtype=tl.float32)
    for step in range(STEPS):
        t = (part * STEPS + step) * BLOCK_T + tl.arange(0, BLOCK_T)
        tile = _dropped_tile(x_ptr, seed, t, k, rows, width, threshold, scale)
        inside = (r[:, None] < rank) & (t[None, :] < rows)
        du = tl.load(du_ptr + t[None, :] * rank + r[:, None], mask=inside, other=0.0)
        total += tl.dot(du, tile, input_precision="ieee")
    out = out_ptr + part * rank * width + r[:, None] * width + k[None, :]
    tl.store(out, total, mask=(r[:, None] < rank) & (k[None, :] < width))
