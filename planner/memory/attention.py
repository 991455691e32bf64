"""Attention as torch and transformers run it on CUDA: the fused kernels, what each saves, and the
masks that decide between them.

q (B, h, S, d); k, v (B, h_kv, K, d). Tensors come as (B, S, h, d) in memory, transposed.
"""

from __future__ import annotations

from math import prod
from typing import Any, Literal

from planner.dtypes import BOOL, F32, INT64, DType
from planner.memory.ops import Engine
from planner.memory.sizes import decide
from planner.memory.tensor import Shape, Tensor
from planner.memory.work import grad_bytes

Implementation = Literal["sdpa", "eager", "flash_attention_2"]
_FLASH_WIDTH = 256  # sdp_utils.cpp, check_head_dim_size_flash


def attend(
    t: Engine, implementation: Implementation, q: Tensor, k: Tensor, v: Tensor,
    mask: Tensor | None = None, causal: bool = True, dropout: float = 0.0,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """transformers' attention interface: output (B, S, h, d), and weights where eager. The fused
    kernels of the families modelled take no dropout and no soft cap."""
    if implementation == "eager":
        from planner.memory.eager_attention import eager  # loaded for eager runs alone

        return eager(t, q, k, v, mask, dropout if t.training else 0.0, softcap)
    if implementation == "flash_attention_2":
        out = flash_attention_2(t, q, k, v, causal)
    else:
        out = sdpa(t, q, k, v, mask, causal)
    return t.contiguous(t.transpose(out, 1, 2)), None


def sdpa(
    t: Engine, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = True
) -> Tensor:
    """F.scaled_dot_product_attention after transformers' sdpa_attention_forward (integrations/
    sdpa_attention.py): keys are repeated for grouped heads where a mask is given. In 16 bits
    without a mask the flash kernel, else the memory-efficient one."""
    groups = q.shape[1] // k.shape[1]
    if mask is not None and groups > 1:
        k, v = repeat_kv(t, k, groups), repeat_kv(t, v, groups)
    q, k, v = t.lower(q), t.lower(k), t.lower(v)
    if mask is None and q.dtype.is_16bit and q.shape[-1] <= _FLASH_WIDTH:
        return flash_padded(t, q, k, v, causal)
    if mask is None and groups > 1:
        k, v = repeat_kv(t, k, groups), repeat_kv(t, v, groups)
    return efficient(t, q, k, v, _bias(t, mask, q.dtype), causal and mask is None)


def flash_attention_2(t: Engine, q: Tensor, k: Tensor, v: Tensor, causal: bool = True) -> Tensor:
    """The flash-attn package through transformers (integrations/flash_attention.py): no mask where
    nothing is padded, fp32 inputs cast to the autocast dtype; saves what torch does."""
    target = t.autocast_dtype
    if target is not None:
        q, k, v = t.to(q, target), t.to(k, target), t.to(v, target)
    return flash_padded(t, q, k, v, causal)


def flash_padded(t: Engine, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """The flash kernel on heads padded to a multiple of 8 (sdp_utils pads and slices)."""
    dim = q.shape[-1]
    if dim % 8 == 0:
        return flash(t, q, k, v, causal)
    q, k, v = (pad_last(t, x, dim + -dim % 8) for x in (q, k, v))
    return t.slice_last(flash(t, q, k, v, causal), dim)


def pad_last(t: Engine, x: Tensor, width: Any) -> Tensor:
    """F.pad of the last dimension with zeros; backward narrows (constant_pad_nd)."""
    shape, source = (*x.shape[:-1], width), x.shape
    t.count(2 * grad_bytes(x))
    out = t.new(shape, x.dtype, "pad")

    def backward(g: Tensor) -> tuple[Tensor]:
        return (t.new(source, g.dtype, "pad (backward)"),)

    return t.record(out, (x,), (), backward)


def flash(t: Engine, q: Tensor, k: Tensor, v: Tensor, causal: bool = True) -> Tensor:
    """The flash kernel. Saves q, k, v, the output and an fp32 log-sum-exp. Backward (flash_attn/
    flash_api.cpp, mha_bwd): the row sums, an fp32 accumulator of dq, dq, dk, dv; with grouped heads
    dk and dv are made for every query head and summed.
    """
    batch, heads, length, dim = q.shape
    kv_heads, keys = k.shape[1], k.shape[2]
    dtype = q.dtype
    out = _like_bshd(t, q.shape, dtype, "attention")
    lse = t.new((batch, heads, length), F32, "attention log-sum-exp")
    seed = t.new((2,), INT64, "attention rng")
    flops = 4 * batch * heads * length * keys * dim // (2 if causal else 1)
    traffic = dtype.itemsize * (prod(q.shape) * 2 + prod(k.shape) * 2)
    t.count_matmul(flops, traffic, dtype)
    needs = (q.requires_grad, k.requires_grad, v.requires_grad)
    shapes = (q.shape, k.shape, v.shape)

    def backward(g: Tensor) -> tuple[Tensor | None, ...]:
        rounded = (length + 127) // 128 * 128
        width = (dim + 31) // 32 * 32
        t.count_matmul(flops * 5 // 2, 3 * traffic, dtype)
        t.count(8 * batch * heads * rounded * width, 3)
        row_sums = t.new((batch, heads, rounded), F32, "attention row sums (backward)")
        accumulator = t.new((batch, heads, rounded, width), F32, "attention dq accumulator")
        grads = [_like_bshd(t, shape, dtype, "attention (backward)") for shape in shapes]
        if kv_heads != heads:
            expanded = [
                t.new((batch, heads, keys, dim), dtype, "attention (backward, per head)")
                for _ in range(2)
            ]
            del expanded
        del row_sums, accumulator
        return tuple(grad if need else None for grad, need in zip(grads, needs, strict=True))

    return t.record(out, (q, k, v), (q, k, v, out, lse, seed, seed), backward)


def flash_pieces(t: Engine, q: Tensor, k: Tensor, v: Tensor, length: int) -> Tensor:
    """sdpa of pieces of `length` positions, one after another: torch.split, the flash kernel for
    each, torch.cat of the outputs (1, P, h, d). One node stands for all of it.

    Backward makes the pieces' gradients one by one, then joins those of v, k and q.
    """
    _, heads, positions, dim = q.shape
    pieces, shape = positions // length, q.shape
    left, needs = (q, k, v), (q.requires_grad, k.requires_grad, v.requires_grad)
    q, k, v = t.lower(q), t.lower(k), t.lower(v)
    dtype = q.dtype
    flops, traffic = 4 * positions * heads * length * dim, 4 * dtype.itemsize * prod(shape)
    parts = t.new((1, positions, heads, dim), dtype, "attention")
    lse = t.new((positions, heads), F32, "attention log-sum-exp")
    t.count_matmul(flops, traffic, dtype)
    t.count(2 * grad_bytes(parts), pieces)
    joined = t.new((1, positions, heads, dim), dtype, "cat (attention)")
    source = left[0].dtype

    def backward(g: Tensor) -> tuple[Tensor | None, ...]:
        rounded, width = (length + 127) // 128 * 128, (dim + 31) // 32 * 32
        t.count_matmul(flops * 5 // 2, 3 * traffic, dtype)
        t.count(3 * grad_bytes(g), 4 * pieces)
        row_sums = t.new((heads, rounded), F32, "attention row sums (backward)")
        accumulator = t.new((heads, rounded, width), F32, "attention dq accumulator")
        del row_sums, accumulator
        if source is not dtype:  # each piece's gradients are cast as they come
            piece = (3, heads, length, dim)
            rounded_grads = t.new(piece, dtype, "attention (backward)")
            del rounded_grads
        grads: list[Tensor | None] = [
            t.new(shape, source, "attention (backward)") if need else None for need in needs
        ]
        for index in (2, 1, 0):
            if needs[index]:
                grads[index] = _like_bshd(t, shape, source, "cat (split backward)")
        return tuple(grads)

    return t.record(joined, left, (q, k, v, parts, lse), backward)


def efficient(
    t: Engine, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, causal: bool
) -> Tensor:
    """The memory-efficient kernel (transformers/cuda/attention_backward.cu): saves q, k, v, the
    bias, the output and a log-sum-exp of rows rounded to 32; backward takes a float a row and, in
    16 bits, dq in fp32."""
    batch, heads, length, dim = q.shape
    keys, dtype = k.shape[2], q.dtype
    out = _like_bshd(t, q.shape, dtype, "attention")
    recorded = t.wants_grad(q)
    rows = (length + 31) // 32 * 32 * recorded
    lse = t.new((batch, heads, rows), F32, "attention log-sum-exp")
    seed = t.new((), INT64, "attention rng")
    flops = 4 * batch * heads * length * keys * dim // (2 if causal else 1)
    traffic = dtype.itemsize * (prod(q.shape) * 2 + prod(k.shape) * 2)
    t.count_matmul(flops, traffic, dtype)
    needs = (q.requires_grad, k.requires_grad, v.requires_grad, False)
    shapes = (q.shape, k.shape, v.shape)

    def backward(g: Tensor) -> tuple[Tensor | None, ...]:
        t.count_matmul(flops * 5 // 2, 3 * traffic, dtype)
        delta = t.new((batch, heads, length), F32, "attention delta (backward)")
        half = dtype.is_16bit
        wide = t.new((batch, heads, length, dim * half), F32, "attention dq in fp32 (backward)")
        grads = [_like_bshd(t, shape, dtype, "attention (backward)") for shape in shapes]
        del delta, wide
        made: list[Tensor | None] = [*grads, None]
        return tuple(grad if need else None for grad, need in zip(made, needs, strict=True))

    return t.record(out, (q, k, v, bias), (q, k, v, bias, out, lse, seed), backward)


def _like_bshd(t: Engine, shape: Shape, dtype: DType, op: str) -> Tensor:
    """The kernels write (B, h, S, d) as (B, S, h, d) in memory."""
    out = t.new(shape, dtype, op)
    out.contiguous = False
    return out


def _bias(t: Engine, mask: Tensor | None, dtype: DType) -> Tensor | None:
    """A boolean mask as 0 and -inf, its rows padded to 16 bytes (attention.cpp, pad_bias)."""
    if mask is None:
        return None
    bias = t.new(mask.shape, dtype, "where (mask)") if mask.dtype is BOOL else mask
    width = mask.shape[-1]
    padded = (width + 7) // 8 * 8
    if decide(padded != width):
        bias = t.new((*mask.shape[:-1], padded), dtype, "pad (mask)")
    return bias


def cached(t: Engine, x: Tensor) -> Tensor:
    """DynamicLayer.update: torch.cat of what is cached, nothing yet, and x: a copy."""
    t.count(2 * grad_bytes(x))
    out = t.new(x.shape, x.dtype, "cat (key-value cache)")
    return t.record(out, (x,), (), lambda g: (g,))


def repeat_kv(t: Engine, x: Tensor, groups: int) -> Tensor:
    """transformers' repeat_kv: expand and reshape, a copy of every head; backward sums them."""
    if groups == 1:
        return x
    batch, heads, length, dim = x.shape
    shape, source = (batch, heads * groups, length, dim), x.shape
    if heads == 1:  # one head, read over and over: a view
        out = x.view(shape, False)
    else:
        out = t.new(shape, x.dtype, "repeat_kv")
        t.count(2 * grad_bytes(out))

    def backward(g: Tensor) -> tuple[Tensor]:
        t.count(2 * grad_bytes(g))
        return (t.new(source, g.dtype, "sum (repeat_kv)"),)

    return t.record(out, (x,), (), backward)


def bool_mask(t: Engine, batch: Any, length: Any, window: bool = False) -> Tensor:
    """masking_utils.sdpa_mask: causality (and a window) over positions, then the padding mask."""
    with t.recorder.scope("mask"):
        shape = (1, 1, length, length)
        rule = t.new(shape, BOOL, "le (mask)")
        for _ in range(3 if window else 1):  # and_masks: True & window & causal, & padding
            joined = t.new(shape, BOOL, "and (mask)")
            del rule
            rule = joined
            del joined
        padded = t.new((batch, 1, length, length), BOOL, "and (mask)")
        del rule
        return padded
