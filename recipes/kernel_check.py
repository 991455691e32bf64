"""The project's Triton kernels beside the same arithmetic in torch, on small random tensors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.chameleon.modeling_chameleon import (
    ChameleonLayerNorm,
    ChameleonRMSNorm,
    apply_rotary_pos_emb,
)

from recipes import kernels
from recipes.dropout import keep_mask
from recipes.evaluation import kernels as forward_kernels

_SEED, _P = -12345, 0.05
_EPS = 1e-5

Pair = tuple[str, Tensor, Tensor]


@torch.no_grad()
def kernel_errors(
    device: torch.device, dtype: torch.dtype, rows: int = 2048, width: int = 4096
) -> dict[str, float]:
    """Largest difference from torch by kernel, as a share of the largest value. Those of the
    adapter's branch sum in fp32 and are held against fp32; those of a layer's forward round as
    torch does, and are held against the modules of transformers in `dtype`."""
    torch.manual_seed(0)
    pairs = [*_of_the_branch(device, dtype, rows, width), *_of_a_layer(device, dtype, rows, width)]
    return {
        name: float((got.float() - want.float()).abs().max() / want.float().abs().max())
        for name, got, want in pairs
    }


def _of_the_branch(
    device: torch.device, dtype: torch.dtype, rows: int, width: int
) -> Iterator[Pair]:
    seed = torch.tensor(_SEED, dtype=torch.int32, device=device)
    shapes = ((rows, width), (16, width), (rows, 16), (rows, width))
    x, a, du, dx = (torch.randn(shape, device=device, dtype=dtype) for shape in shapes)
    kept = keep_mask(x.shape, seed, _P) / (1 - _P)
    masked, branch = x.float() * kept, (du.float() @ a.float()) * kept
    yield "up", kernels.up(x, a, seed, _P), masked @ a.float().t()
    yield "down_gradient", kernels.down_gradient(du, x, seed, _P), du.float().t() @ masked
    yield "add_branch", kernels.add_branch(dx.clone(), du, a, seed, _P), dx.float() + branch


def _of_a_layer(device: torch.device, dtype: torch.dtype, rows: int, width: int) -> Iterator[Pair]:
    def drawn(module: nn.Module) -> Any:
        for parameter in module.parameters():
            parameter.normal_(1.0, 0.2)
        return module.to(device, dtype)

    head = 128
    heads = max(1, width // head - 1)  # not a power of 2
    norm = drawn(ChameleonRMSNorm(width, _EPS))
    x, added, up = (torch.randn(rows, width, device=device, dtype=dtype) for _ in range(3))
    yield "rms_norm", forward_kernels.rms_norm(x, norm.weight, _EPS), norm(x)
    total, normed = forward_kernels.add_rms_norm(x, added, norm.weight, _EPS)
    yield "add_rms_norm, sum", total, x + added
    yield "add_rms_norm, norm", normed, norm(x + added)
    gated = forward_kernels.silu_mul_(x.clone(), up)
    yield "silu_mul", gated, nn.functional.silu(x) * up

    q = torch.randn(rows, heads, head, device=device, dtype=dtype)
    cos, sin = (torch.randn(rows, head, device=device, dtype=dtype) for _ in range(2))
    by_head = drawn(ChameleonLayerNorm((heads, head)))
    rms = drawn(ChameleonRMSNorm(head, _EPS))
    norms = {
        "rotate": (None, q),
        "rotate, layer norm": ((by_head.weight, by_head.bias, by_head.eps), by_head(q)),
        "rotate, RMS norm": ((rms.weight, None, _EPS), rms(q)),
    }
    for name, (parameters, normed) in norms.items():
        want = apply_rotary_pos_emb(normed[None], normed[None], cos[None], sin[None], 2)[0][0]
        yield name, forward_kernels.rotate_(q.clone(), cos, sin, parameters), want
