"""Triton kernels of a layer's forward: norm, rotation and gate, each one pass over memory.

Every intermediate is rounded to the tensors' dtype where transformers' operators store it, so that
what comes out is theirs to the last bit or two. Imported on CUDA only;
recipes.evaluation.packed_layer holds the same arithmetic in torch.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_GATE_BLOCK = 2048
# A product rounded on its own stays so: fused into the sum after it, it would not be rounded.
_ROUNDED = {"enable_fp_fusion": False}
_NO_NORM, _RMS, _LAYER = 0, 1, 2


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """weight * x / rms(x) over the last dimension; x (T, D), weight (D,)."""
    out = torch.empty_like(x)
    _rms_norm[(len(x),)](
        x, x, out, out, weight, x.shape[1], eps, ADD=False, **_row(x.shape[1])
    )  # fmt: skip
    return out


def add_rms_norm(x: Tensor, added: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(x + added, its RMS norm); x and added (T, D), weight (D,)."""
    total, out = torch.empty_like(x), torch.empty_like(x)
    _rms_norm[(len(x),)](
        x, added, total, out, weight, x.shape[1], eps, ADD=True, **_row(x.shape[1])
    )  # fmt: skip
    return total, out


def rotate_(
    x: Tensor, cos: Tensor, sin: Tensor, norm: tuple[Tensor, Tensor | None, float] | None
) -> Tensor:
    """x (T, H, D) normed by head and rotated by cos and sin (T, D), in place; D twice a power of 2.

    norm: (weight, bias, eps); without a bias an RMS norm, weight (D,); with one a layer norm,
    weight and bias (H, D); None for no norm.
    """
    _, heads, width = x.shape
    kind, weight, bias, eps = _NO_NORM, cos, cos, 0.0
    if norm is not None:
        kind = _RMS if norm[1] is None else _LAYER
        weight, bias, eps = norm[0], norm[0] if norm[1] is None else norm[1], norm[2]
    _rotate[(len(x),)](
        x, cos.contiguous(), sin.contiguous(), weight, bias, heads, eps,
        NORM=kind, HALF=width // 2, HEADS=triton.next_power_of_2(heads), num_warps=8,
        **_ROUNDED,
    )  # fmt: skip
    return x


def silu_mul_(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, into gate."""
    size = gate.numel()
    _silu_mul[(triton.cdiv(size, _GATE_BLOCK),)](gate, up, size, BLOCK=_GATE_BLOCK, num_warps=8,
                                                **_ROUNDED)  # fmt: skip
    return gate


def _row(width: int) -> dict[str, Any]:
    block = triton.next_power_of_2(width)
    return {"BLOCK": block, "num_warps": min(16, max(1, block // 512)), **_ROUNDED}


@triton.jit  # type: ignore[untyped-decorator]
def _rms_norm(  # type: ignore[no-untyped-def]
    x_ptr, added_ptr, total_ptr, out_ptr, weight_ptr, width, eps,
    ADD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    dtype = x_ptr.dtype.element_ty
    column = tl.arange(0, BLOCK)
    place = tl.program_id(0).to(tl.int64) * width + column
    inside = column < width
    x = tl.load(x_ptr + place, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        added = tl.load(added_ptr + place, mask=inside, other=0.0).to(tl.float32)
        total = (x + added).to(dtype)
        tl.store(total_ptr + place, total, mask=inside)
        x = total.to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, axis=0) / width + eps)
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(
        out_ptr + place, ((x * scale).to(dtype).to(tl.float32) * weight).to(dtype), mask=inside
    )


@triton.jit  # type: ignore[untyped-decorator]
def _rotate(  # type: ignore[no-untyped-def]
    x_ptr, cos_ptr, sin_ptr, weight_ptr, bias_ptr, heads, eps,
    NORM: tl.constexpr, HALF: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    dtype = x_ptr.dtype.element_ty
    token = tl.program_id(0).to(tl.int64)
    head, column = tl.arange(0, HEADS)[:, None], tl.arange(0, HALF)[None, :]
    inside = head < heads
    of_head = head * (2 * HALF) + column
    place = token * heads * (2 * HALF) + of_head
    a = tl.load(x_ptr + place, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(x_ptr + place + HALF, mask=inside, other=0.0).to(tl.float32)
    if NORM == 2:
        mean = (tl.sum(a, axis=1) + tl.sum(b, axis=1)) / (2 * HALF)
        a -= mean[:, None]
        b -= mean[:, None]
    if NORM != 0:
        variance = (tl.sum(a * a, axis=1) + tl.sum(b * b, axis=1)) / (2 * HALF)
        scale = tl.rsqrt(variance + eps)[:, None]
        weights = weight_ptr + (of_head if NORM == 2 else column)
        w_a = tl.load(weights, mask=inside, other=0.0).to(tl.float32)
        w_b = tl.load(weights + HALF, mask=inside, other=0.0).to(tl.float32)
        a = ((a * scale).to(dtype).to(tl.float32) * w_a).to(dtype).to(tl.float32)
        b = ((b * scale).to(dtype).to(tl.float32) * w_b).to(dtype).to(tl.float32)
    if NORM == 2:
        a = (a + tl.load(bias_ptr + of_head, mask=inside, other=0.0).to(tl.float32)).to(dtype)
        b = (b + tl.load(bias_ptr + of_head + HALF, mask=inside, other=0.0).to(tl.float32)).to(
            dtype
        )
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    angle = token * (2 * HALF) + column
    cos_a = tl.load(cos_ptr + angle).to(tl.float32)
    cos_b = tl.load(cos_ptr + angle + HALF).to(tl.float32)
    sin_a = tl.load(sin_ptr + angle).to(tl.float32)
    sin_b = tl.load(sin_ptr + angle + HALF).to(tl.float32)
    first = (a * cos_a).to(dtype).to(tl.float32) - (b * sin_a).to(dtype).to(tl.float32)
    second = (b * cos_b).to(dtype).to(tl.float32) + (a * sin_b).to(dtype).to(tl.float32)
    tl.store(x_ptr + place, first.to(dtype), mask=inside)
    tl.store(x_ptr + place + HALF, second.to(dtype), mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _silu_mul(gate_ptr, up_ptr, size, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    dtype = gate_ptr.dtype.element_ty
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < size
    gate = tl.load(gate_ptr + place, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + place, mask=inside, other=0.0).to(tl.float32)
    activated = (gate / (1 + tl.exp(-gate))).to(dtype).to(tl.float32)
    tl.store(gate_ptr + place, (activated * up).to(dtype), mask=inside)
