"""Norms as modelling code runs them: RMSNorm, statement by statement, and torch's LayerNorm."""

from __future__ import annotations

from math import prod

from planner.dtypes import F32
from planner.memory.ops import Engine
from planner.memory.tensor import Tensor
from planner.memory.work import grad_bytes


def rms_norm(t: Engine, weight: Tensor, x: Tensor) -> Tensor:
    """LlamaRMSNorm.forward: statistics in fp32, the weight applied in the input's dtype."""
    source = x.dtype
    h = t.to(x, F32)
    variance = t.mean_last(t.pow2(h))  # a name in its code: there until it returns
    h = t.mul(h, t.rsqrt(t.add_scalar(variance)))
    return t.mul(weight, t.to(h, source))


def gemma_rms_norm(t: Engine, weight: Tensor, x: Tensor) -> Tensor:
    """Gemma2RMSNorm.forward: (1 + weight) applied in fp32, then back to the input's dtype."""
    source = x.dtype
    h = t.to(x, F32)
    h = t.mul(h, t.rsqrt(t.add_scalar(t.mean_last(t.pow2(h)))))
    h = t.mul(h, t.add_scalar(t.to(weight, F32)))
    return t.to(h, source)


def layer_norm(
    t: Engine, x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """F.layer_norm, an fp32 operation under autocast: saves its input and two statistics."""
    x = t.upper(x)
    if weight is not None and bias is not None:
        weight, bias = t.upper(weight), t.upper(bias)
    t.count(2 * grad_bytes(x))
    rows = prod(x.shape[:-1])
    out = t.new(x.shape, x.dtype, "layer_norm")
    mean = t.new((rows,), F32, "layer_norm statistics")
    rstd = t.new((rows,), F32, "layer_norm statistics")
    shape, dtype = x.shape, x.dtype
    need = (x.requires_grad, bool(weight is not None and weight.requires_grad),
            bool(bias is not None and bias.requires_grad))  # fmt: skip

    def backward(g: Tensor) -> tuple[Tensor | None, ...]:
        t.count(3 * prod(shape) * dtype.itemsize)
        grads = [t.new(shape, dtype, "layer_norm (backward)") if need[0] else None]
        grads += [t.new((shape[-1],), dtype, "layer_norm (backward)") if n else None
                  for n in need[1:]]  # fmt: skip
        if not g.contiguous:  # layer_norm_kernel.cu: dY.contiguous(), once the results are there
            t.new(shape, dtype, "contiguous (layer_norm backward)")
        return tuple(grads)

    return t.record(out, (x, weight, bias), (x, mean, rstd, weight), backward)
