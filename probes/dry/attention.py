"""Scaled dot product attention as torch chooses and runs it on CUDA (sdp_utils.cpp)."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

aten = torch.ops.aten
HALF = (torch.float16, torch.bfloat16)


def attend(
    recorder: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
    attn_mask: torch.Tensor | None = None, dropout_p: float = 0.0, is_causal: bool = False,
    *, scale: float | None = None, enable_gqa: bool = False,
) -> torch.Tensor:  # fmt: skip
    """query [B, H, S, D], key and value [B, Hk, T, D] -> [B, H, S, D].

    Without a mask and in 16 bits the flash or cuDNN kernel, which save the same: q, k, v, output
    and an fp32 log-sum-exp; otherwise the memory-efficient kernel (a mask is padded to 16 bytes),
    which takes no grouped heads: torch's own products do (MATH, as an H200 chose).
    """
    width = query.shape[-1]
    if query.dtype in HALF and attn_mask is None and width <= 256:
        padded = [_pad(x, 8) for x in (query, key, value)]
        out = aten._scaled_dot_product_flash_attention(
            *padded, dropout_p, is_causal, False, scale=scale or width**-0.5
        )[0]
        return out[..., : value.shape[-1]]
    if enable_gqa and query.shape[-3] != key.shape[-3]:
        math: torch.Tensor = aten._scaled_dot_product_attention_math(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=True
        )[0]
        return math
    bias = _bias(attn_mask, query)
    out = aten._scaled_dot_product_efficient_attention(
        query, key, value, bias, torch.is_grad_enabled() and query.requires_grad, dropout_p,
        is_causal, scale=scale,
    )  # fmt: skip
    return out[0]


def _pad(x: torch.Tensor, multiple: int) -> torch.Tensor:
    extra = -x.shape[-1] % multiple
    return F.pad(x, (0, extra)) if extra else x


def _bias(mask: torch.Tensor | None, query: torch.Tensor) -> torch.Tensor | None:
    if mask is None:
        return None
    if mask.dtype is torch.bool:
        zero = torch.zeros((), dtype=query.dtype, device=query.device)
        mask = torch.where(mask, zero, float("-inf"))
    extra = -mask.shape[-1] % (16 // mask.element_size())
    if extra:
        mask = F.pad(mask, (0, extra))[..., : mask.shape[-1]]
    return mask.expand(*query.shape[:-1], mask.shape[-1])
