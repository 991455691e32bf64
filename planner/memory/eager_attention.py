"""Attention as products and a softmax, one operation after another: attn_implementation="eager".

q (B, h, S, d); k, v (B, h_kv, K, d). Tensors come as (B, S, h, d) in memory, transposed.
"""

from __future__ import annotations

from math import prod
from typing import Any

from planner.dtypes import BOOL, F16, F32, DType
from planner.memory.attention import bool_mask, each_piece, one_by_one, repeat_kv
from planner.memory.ops import Engine
from planner.memory.sizes import decide
from planner.memory.tensor import Tensor
from planner.memory.work import grad_bytes

# Of one piece: what its two products and its softmax save; kernels of its backward (four products,
# the scale, the softmax and its casts, the copy).
_PIECE_SAVES, _PIECE_BACKWARD = 5, 9


def eager(
    t: Engine, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float = 0.0,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """transformers' eager_attention_forward: (output (B, S, h, d), weights (B, h, S, K)). The mask
    is of the embeddings' dtype and promotes the scores; softmax is in fp32."""
    groups = q.shape[1] // k.shape[1]
    keys, values = repeat_kv(t, k, groups), repeat_kv(t, v, groups)
    weights = t.scale(matmul(t, q, keys, transposed=True))
    if softcap is not None:
        weights = t.scale(weights, "div")
        weights = t.tanh(weights)
        weights = t.scale(weights)
    if mask is not None:
        weights = t.add(weights, mask, "add (mask)")
    weights = t.to(softmax(t, weights), q.dtype)
    weights = t.dropout(weights, dropout)
    out = matmul(t, weights, values)
    out = t.contiguous(t.transpose(out, 1, 2))
    return out, weights


def eager_pieces(t: Engine, q: Tensor, k: Tensor, v: Tensor, length: int) -> Tensor:
    """Eager attention of pieces of `length` positions: (1, P, h, d). They run one after another;
    many are run as one batch, and only the count of kernels knows."""
    _, heads, positions, dim = q.shape
    pieces = positions // length
    if one_by_one(pieces):
        return each_piece(t, q, k, v, pieces, lambda a, b, c: eager(t, a, b, c, None)[0])
    shape = (1, pieces * heads, length, dim)  # one sample: what its products read is not copied
    q, k, v = (t.alias(x, shape, False, reshapes=False) for x in (q, k, v))
    before = t.work.launches
    out, _weights = eager(t, q, k, v, None)
    launches = t.work.launches - before
    t.count_pieces(pieces, launches, _PIECE_SAVES)
    joined = t.alias(out, (1, positions, heads, dim), True)

    def backward(g: Tensor) -> tuple[Tensor]:
        t.count_pieces(pieces, _PIECE_BACKWARD, 0)
        return (g,)

    return t.record(joined.view(joined.shape), (joined,), (), backward)


def math_kernel(t: Engine, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """_scaled_dot_product_attention_math (transformers/attention.cpp) of grouped heads: in fp32,
    queries and keys each scaled by the root, a softmax that looks for rows without any key."""
    source = q.dtype
    q, k, v = t.to(q, F32), t.to(k, F32), t.to(v, F32)
    q = t.scale(q)
    length, groups = q.shape[2], q.shape[1] // k.shape[1]
    mask = None
    if causal:
        ones = t.new((length, length), BOOL, "ones (mask)")
        rule = t.new(ones.shape, BOOL, "tril (mask)")
        del ones
        mask = t.new(rule.shape, F32, "where (mask)")
        del rule
    k, v = _interleaved(t, k, groups), _interleaved(t, v, groups)
    scores = matmul(t, q, t.scale(k), transposed=True)
    t.count(3 * grad_bytes(scores))  # the mask is added in place
    weights = softmax(t, scores)
    empty = t.new(scores.shape, BOOL, "eq (softmax)")
    t.new(scores.shape[:-1], BOOL, "all (softmax)")
    del empty, scores
    out = matmul(t, weights, v)
    del mask
    return t.to(out, source)


def _interleaved(t: Engine, x: Tensor, groups: int) -> Tensor:
    """repeat_interleave of the heads: expand and clone; backward sums."""
    batch, heads, length, dim = source = x.shape
    out = t.new((batch, heads * groups, length, dim), x.dtype, "clone (repeat_interleave)")
    t.count(2 * grad_bytes(out))

    def backward(g: Tensor) -> tuple[Tensor]:
        t.count(2 * grad_bytes(g))
        return (t.new(source, g.dtype, "sum (repeat_interleave)"),)

    return t.record(out, (x,), (), backward)


def eager_mask(t: Engine, batch: Any, length: Any, dtype: DType, window: bool = False) -> Tensor:
    """masking_utils.eager_mask: (B, 1, S, S) of 0 and finfo.min, made of a boolean one."""
    allowed = bool_mask(t, batch, length, window)
    mask = t.new(allowed.shape, dtype, "where (mask)")
    del allowed
    return mask


def softmax(t: Engine, x: Tensor) -> Tensor:
    """softmax(x, -1, dtype=float32) (SoftMax.cpp): fp16 scores are read as they are
    (half_to_float), bf16 ones are copied to fp32 first; saves its result; the gradient is of the
    scores' dtype, in bf16 after one in fp32."""
    if x.dtype is not F16:
        x = t.to(x, F32, "to (softmax)")
    out = t.new(x.shape, F32, "softmax")
    t.count(grad_bytes(x) + grad_bytes(out))
    shape, dtype = x.shape, x.dtype

    def backward(g: Tensor) -> tuple[Tensor]:
        t.count(prod(shape) * (16 + dtype.itemsize))
        result = t.new(shape, dtype, "softmax (backward)")
        t.new(shape, F32, "grad * output (softmax backward)")  # SoftMax.cu: made before the kernel
        return (result,)

    return t.record(out, (x,), (out,), backward)


def matmul(t: Engine, a: Tensor, b: Tensor, transposed: bool = False) -> Tensor:
    """torch.matmul of (B, h, n, m) with (B, h, m, p), or with b.transpose(2, 3) of (B, h, p, m):
    both are reshaped to (B·h, ., .), which copies transposed heads unless B is 1, then bmm."""
    b, a = t.lower_all(b, a)
    last = b.shape[2] if transposed else b.shape[3]
    out = bmm(t, _merge_heads(t, a), _merge_heads(t, b, transposed))
    shape, merged = (*a.shape[:-1], last), out.shape
    result = out.view(shape)

    def backward(g: Tensor) -> tuple[Tensor]:
        if not g.contiguous and decide(shape[0] > 1):
            g = t.new(shape, g.dtype, "reshape (backward)")
        return (g.view(merged, True),)

    return t.record(result, (out,), (), backward)


def _merge_heads(t: Engine, x: Tensor, transposed: bool = False) -> Tensor:
    """x.reshape(B·h, n, m), or the same of x.transpose(2, 3)."""
    batch, heads, n, m = shape = x.shape
    if not x.contiguous and not decide(batch == 1):
        x = t.clone(x, "reshape")
    out = x.view((batch * heads, m, n) if transposed else (batch * heads, n, m), True)
    return t.record(out, (x,), (), lambda g: (g.view(shape, True),))


def bmm(t: Engine, a: Tensor, b: Tensor) -> Tensor:
    """torch.bmm of (N, n, m) and (N, m, p): saves what the other's gradient needs."""
    (number, n, m), p = a.shape, b.shape[-1]
    dtype = a.dtype
    out = t.new((number, n, p), dtype, "bmm")
    flops, traffic = 2 * number * n * m * p, dtype.itemsize * number * (n * m + m * p + n * p)
    t.count_matmul(flops, traffic, dtype)
    shapes, needs = (a.shape, b.shape), (a.requires_grad, b.requires_grad)

    def backward(g: Tensor) -> tuple[Tensor | None, ...]:
        grads: list[Tensor | None] = [None, None]
        for index in (1, 0):  # the gradient of mat2 is made first
            if needs[index]:
                t.count_matmul(flops, traffic, dtype)
                grads[index] = t.new(shapes[index], dtype, "bmm (backward)")
        return tuple(grads)

    saved = (a if needs[1] else None, b if needs[0] else None)
    return t.record(out, (a, b), saved, backward)
