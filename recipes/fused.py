"""A frozen linear with a LoRA adapter as one operator that saves its input and a rank-wide row.

y = x W' + s * (drop(x) A') B'. peft's chain of operators keeps the dropped input, its fp32 or
16-bit casts and vocabulary- or width-sized intermediates; here backward rebuilds the dropout mask
from its seed and dequantises a 4-bit weight anew. An opaque operator for torch.compile, so that no
dequantised weight is ever kept between forward and backward.

Shapes: x (..., K), weight (N, K) or bitsandbytes' packed 4 bits, A (r, K), B (N, r).
"""

from __future__ import annotations

from typing import Any

import torch
from bitsandbytes.functional import QuantState, dequantize_4bit
from torch import Tensor

from recipes.dropout import add_branch, down_gradient, up_projection


@torch.library.custom_op("vramwise::adapted_linear", mutates_args=())
def adapted_linear(
    x: Tensor,
    weight: Tensor,
    quant: list[Tensor],
    quant_type: str,
    shape: list[int],
    bias: Tensor | None,
    a: Tensor | None,
    b: Tensor | None,
    seed: Tensor | None,
    scaling: float,
    dropout: float,
) -> tuple[Tensor, Tensor]:
    """(y, u) with u = drop(x) A' of shape (rows, r), empty without an adapter.

    quant: [] for a dense weight, [absmax] for 4 bits, [absmax, code2, absmax2, offset] where the
    absmax are themselves quantised; bias and weight get no gradient.
    """
    rows = x.reshape(-1, shape[1])
    y = torch.nn.functional.linear(rows, _dense(weight, quant, quant_type, shape, x.dtype), bias)
    u = x.new_empty(0)
    if a is not None and b is not None:
        u = up_projection(rows, a.to(x.dtype), seed, dropout)
        y.addmm_(u, b.to(x.dtype).t(), alpha=scaling)
    return y.view(*x.shape[:-1], shape[0]), u


@adapted_linear.register_fake
def _(x, weight, quant, quant_type, shape, bias, a, b, seed, scaling, dropout):  # type: ignore[no-untyped-def]
    rows = x.numel() // shape[1]
    u = x.new_empty(0) if a is None else x.new_empty(rows, a.shape[0])
    return x.new_empty(*x.shape[:-1], shape[0]), u


@torch.library.custom_op("vramwise::adapted_linear_backward", mutates_args=())
def adapted_linear_backward(
    grad: Tensor,
    x: Tensor | None,
    u: Tensor,
    weight: Tensor,
    quant: list[Tensor],
    quant_type: str,
    shape: list[int],
    a: Tensor | None,
    b: Tensor | None,
    seed: Tensor | None,
    scaling: float,
    dropout: float,
    needs_input: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of (x, A, B); an empty tensor for one that is not asked for. x may be None
    without an adapter: a frozen linear needs none of its input."""
    rows = grad.reshape(-1, shape[0])
    dx, da, db = (grad.new_empty(0) for _ in range(3))
    if needs_input:
        dx = rows @ _dense(weight, quant, quant_type, shape, grad.dtype)
    if a is not None and b is not None and x is not None:
        source = x.reshape(-1, shape[1])
        down = a.to(grad.dtype)
        du = (rows @ b.to(grad.dtype)).mul_(scaling)
        db = (rows.t() @ u).to(b.dtype).mul_(scaling)
        da = down_gradient(du, source, seed, dropout).to(a.dtype)
        if needs_input:
            dx = add_branch(dx, du, down, seed, dropout)
    if needs_input:
        dx = dx.view(*grad.shape[:-1], shape[1])
    return dx, da, db


@adapted_linear_backward.register_fake
def _(grad, x, u, weight, quant, quant_type, shape, a, b, seed, scaling, dropout, needs_input):  # type: ignore[no-untyped-def]
    dx = grad.new_empty(*grad.shape[:-1], shape[1]) if needs_input else grad.new_empty(0)
    if a is None:
        return dx, grad.new_empty(0), grad.new_empty(0)
    return dx, torch.empty_like(a), torch.empty_like(b)


def _setup(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    x, weight, quant, quant_type, shape, _, a, b, seed, scaling, dropout = inputs
    ctx.save_for_backward(None if a is None else x, output[1], weight, a, b, seed, *quant)
    ctx.rest = (quant_type, shape, scaling, dropout)
    ctx.quants = len(quant)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple:
    x, u, weight, a, b, seed, *quant = ctx.saved_tensors
    quant_type, shape, scaling, dropout = ctx.rest
    needs_input = ctx.needs_input_grad[0]
    dx, da, db = adapted_linear_backward(
        grad.contiguous(), x, u, weight, quant, quant_type, shape, a, b, seed, scaling, dropout,
        needs_input,
    )  # fmt: skip
    adapted = a is not None
    return (
        dx if needs_input else None, None, [None] * ctx.quants, None, None, None,
        da if adapted else None, db if adapted else None, None, None, None,
    )  # fmt: skip


adapted_linear.register_autograd(_backward, setup_context=_setup)


def _dense(
    weight: Tensor, quant: list[Tensor], quant_type: str, shape: list[int], dtype: torch.dtype
) -> Tensor:
    """The weight (N, K) in `dtype`: as it is, or dequantised."""
    if not quant:
        return weight
    nested = None
    if len(quant) == 4:
        nested = QuantState(absmax=quant[2], code=quant[1], blocksize=256, dtype=torch.float32)
    state = QuantState(
        absmax=quant[0], shape=torch.Size(shape), blocksize=64, quant_type=quant_type,
        dtype=dtype, offset=quant[3] if nested else None, state2=nested,
    )  # fmt: skip
    return dequantize_4bit(weight, state)
