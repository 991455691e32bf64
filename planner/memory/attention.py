"""Attention as torch and transformers run it on CUDA: the fused kernels, what each saves, and the
masks that decide between them.

q (B, h, S, d); k, v (B, h_kv, K, d). Tensors come as (B, S, h, d) in memory, transposed.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any, Literal

from planner.dtypes import BOOL, F32, INT64, DType
from planner.memory.allocator import SMALL_BYTES
from planner.memory.ops import Engine, promote
from planner.memory.sizes import decide
from planner.memory.tensor import Shape, Tensor
from planner.memory.work import grad_bytes

Implementation = Literal["sdpa", "eager", "flash_attention_2"]
_CUDNN_MARGIN_FLOATS = 64  # in allocator histories of an H200, at every shape
_PIECES_ONE_BY_ONE = 16  # images one by one; windows, which are many and small, at once
_FLASH_WIDTH = 256  # sdp_utils.cpp, check_head_dim_size_flash


def sdpa(
    t: Engine, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = True
) -> Tensor:
    """F.scaled_dot_product_attention after transformers' sdpa_attention_forward (integrations/
    sdpa_attention.py): keys are repeated for grouped heads where a mask is given. In 16 bits
    without a mask the flash kernel, else the memory-efficient one, which takes no grouped heads:
    those are left to torch's own products."""
    groups = q.shape[1] // k.shape[1]
    if mask is not None and groups > 1:
        k, v = repeat_kv(t, k, groups), repeat_kv(t, v, groups)
    v, k, q = t.lower_all(v, k, q)
    if mask is None and q.dtype.is_16bit and q.shape[-1] <= _FLASH_WIDTH:
        return flash_padded(t, q, k, v, causal)
    if mask is None and groups > 1:
        from planner.memory.eager_attention import math_kernel  # for such runs alone

        return math_kernel(t, q, k, v, causal)
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
    seed, offset = t.new((2,), INT64, "attention rng"), t.new((), INT64, "attention rng")
    flops = 4 * batch * heads * length * keys * dim // (2 if causal else 1)
    traffic = dtype.itemsize * (prod(q.shape) * 2 + prod(k.shape) * 2)
    t.count_matmul(flops, traffic, dtype)
    needs = (q.requires_grad, k.requires_grad, v.requires_grad)
    shapes = (q.shape, k.shape, v.shape)

    def backward(g: Tensor) -> tuple[Tensor | None, ...]:
        grads = [_like_bshd(t, shape, dtype, "attention (backward)") for shape in shapes]
        t.count_matmul(flops * 5 // 2, 3 * traffic, dtype)
        t.count(8 * batch * heads * length * dim, 3)
        per_head = 2 * (batch * heads * keys * dim,) if kv_heads != heads else ()
        held = flash_buffers(t, batch * heads, length, dim, [(n, dtype) for n in per_head])
        del held
        return tuple(grad if need else None for grad, need in zip(grads, needs, strict=True))

    return t.record(out, (q, k, v), (q, k, v, out, lse, seed, offset), backward)


def flash_buffers(
    t: Engine, rows: Any, length: Any, dim: int, expanded: list[tuple[Any, DType]]
) -> list[Tensor]:
    """A float for each position of `rows` sequences, an fp32 accumulator of dq, and what else is
    `expanded`: buffers of their own in flash (flash_api.cpp, mha_bwd; lengths rounded to 128, heads
    to 32), in cuDNN one workspace, 256 bytes larger."""
    rounded = length if t.cudnn_attention else (length + 127) // 128 * 128
    width = dim if t.cudnn_attention else (dim + 31) // 32 * 32
    sizes = [(rows * rounded, F32), (rows * rounded * width, F32), *expanded]
    if t.cudnn_attention:
        floats = sum(count * dtype.itemsize // 4 for count, dtype in sizes) + _CUDNN_MARGIN_FLOATS
        return [t.new((floats,), F32, "attention workspace (backward)")]
    return [t.new((count,), dtype, "attention buffers (backward)") for count, dtype in sizes]


def flash_pieces(t: Engine, q: Tensor, k: Tensor, v: Tensor, length: int) -> Tensor:
    """sdpa of pieces of `length` positions, one after another: torch.split, the flash kernel for
    each, torch.cat of the outputs (1, P, h, d). One node stands for all of it.

    Backward makes the pieces' gradients one by one, then joins those of v, k and q.
    """
    _, heads, positions, dim = q.shape
    pieces, shape = positions // length, q.shape
    if one_by_one(pieces):
        return each_piece(t, q, k, v, pieces, lambda a, b, c: t.transpose(
            sdpa(t, a, b, c, causal=False), 1, 2))  # fmt: skip
    left, needs = (q, k, v), (q.requires_grad, k.requires_grad, v.requires_grad)
    q, k, v = t.lower(q), t.lower(k), t.lower(v)
    dtype = q.dtype
    flops, traffic = 4 * positions * heads * length * dim, 4 * dtype.itemsize * prod(shape)
    parts = _scattered(t, pieces, (length, heads, dim), dtype, "attention")
    lse = _scattered(t, pieces, (length, heads), F32, "attention log-sum-exp")
    t.count_matmul(flops, traffic, dtype)
    t.count(2 * prod(shape) * dtype.itemsize, pieces)
    t.count_pieces(pieces, 0, 7)  # q, k, v, the output, its log-sum-exp, the seed and its offset
    joined = t.new((1, positions, heads, dim), dtype, "cat (attention)")
    source = left[0].dtype

    def backward(g: Tensor) -> tuple[Tensor | None, ...]:
        t.count_matmul(flops * 5 // 2, 3 * traffic, dtype)
        t.count(3 * grad_bytes(g), 4 * pieces)
        held = flash_buffers(t, heads, length, dim, [])
        del held
        if source is not dtype:  # each piece's gradients are cast as they come
            piece = (3, heads, length, dim)
            rounded_grads = t.new(piece, dtype, "attention (backward)")
            del rounded_grads
        made = [
            _scattered(t, pieces, (length, heads, dim), source, "attention (backward)")
            for need in needs if need
        ]  # fmt: skip
        grads: list[Tensor | None] = [None] * 3
        for index in (2, 1, 0):
            if needs[index]:
                grads[index] = _like_bshd(t, shape, source, "cat (split backward)")
                made.pop()
        return tuple(grads)

    return t.record(joined, left, (q, k, v, *parts, *lse), backward)


def _scattered(t: Engine, pieces: Any, shape: Shape, dtype: DType, op: str) -> list[Tensor]:
    """A tensor for each piece, or where these are small a few of the small pool's largest size."""
    size = prod(shape) * dtype.itemsize
    if not isinstance(pieces, int) or size > SMALL_BYTES:
        return [t.new((pieces, *shape), dtype, op)]
    each = SMALL_BYTES // size
    counts = [each] * (pieces // each) + [pieces % each] * (pieces % each > 0)
    return [t.new((count, *shape), dtype, op) for count in counts]


def one_by_one(pieces: Any) -> bool:
    """Whether the pieces are few enough to be run one after another."""
    return isinstance(pieces, int) and pieces <= _PIECES_ONE_BY_ONE


def each_piece(
    t: Engine, q: Tensor, k: Tensor, v: Tensor, pieces: int,
    attend: Callable[[Tensor, Tensor, Tensor], Tensor],
) -> Tensor:  # fmt: skip
    """torch.split, `attend` of each piece, (1, p, h, d), torch.cat of the outputs."""
    split = [_split(t, x, pieces) for x in (q, k, v)]
    outs = [attend(*(parts[index] for parts in split)) for index in range(pieces)]
    del split
    (_, heads, positions, dim), dtype = q.shape, outs[0].dtype
    shapes = [out.shape for out in outs]
    whole = t.new((1, positions, heads, dim), dtype, "cat (attention)")
    return t.record(whole, outs, (), lambda g: tuple(g.view(o, False) for o in shapes))


def _split(t: Engine, x: Tensor, pieces: int) -> list[Tensor]:
    """torch.split along the positions: views, whose gradients are joined once all are there."""
    batch, heads, positions, dim = source = x.shape
    shape, grads = (batch, heads, positions // pieces, dim), list[Tensor]()
    token = Tensor(None, source, x.dtype)

    def join(_: Tensor) -> tuple[Tensor]:
        whole = t.new(source, x_dtype, "cat (split backward)")
        whole.contiguous = False
        grads.clear()
        return (whole,)

    def collect(g: Tensor) -> tuple[Tensor | None]:
        grads.append(g)
        return (token if len(grads) == pieces else None,)

    x_dtype = x.dtype
    base = t.record(x.view(source, x.contiguous), (x,), (), join)
    return [t.record(x.view(shape, False), (base,), (), collect) for _ in range(pieces)]


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
    seed, offset = (t.new((), INT64, "attention rng") for _ in range(2))
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

    return t.record(out, (q, k, v, bias), (q, k, v, bias, out, lse, seed, offset), backward)


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


def cached(t: Engine, x: Tensor, keys: Tensor) -> Tensor:
    """DynamicLayer.update: torch.cat of what is cached, nothing yet in the keys' dtype, and x: a
    copy, in the wider dtype."""
    t.count(2 * grad_bytes(x))
    out = t.new(x.shape, promote(x.dtype, keys.dtype), "cat (key-value cache)")
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
