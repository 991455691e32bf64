"""Fused attention kernels: what they return, and the buffers their backward makes inside.

flash: transformers/cuda/attention.cu and flash_attn/flash_api.cpp (`mha_fwd`, `mha_bwd`); cuDNN's
plan asks for the same buffers as one workspace. efficient: attention_backward.cu.
"""

from __future__ import annotations

from typing import Any

import torch

from probes.dry.standins import stands_for

_CUDNN_MARGIN_BYTES = 256  # seen in allocator histories of an H200 at every shape


def _like_bshd(x: torch.Tensor, width: int | None = None) -> torch.Tensor:
    """Empty [B, H, S, D] laid out as [B, S, H, D], as the kernels write it."""
    batch, heads, length, depth = x.shape
    return x.new_empty((batch, length, heads, width or depth)).transpose(1, 2)


@stands_for("aten::_scaled_dot_product_flash_attention")
def flash(recorder: Any, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Saved for backward: output, and log-sum-exp fp32 [B, H, S]."""
    query, key = args[:2]
    batch, heads, length, _ = query.shape
    output = _like_bshd(query)
    stats = query.new_empty((batch, heads, length), dtype=torch.float32)
    seed = query.new_empty((2,), dtype=torch.uint64)
    offset = query.new_empty((), dtype=torch.uint64)
    debug = query.new_empty((0,))
    none = query.new_empty((0,), dtype=torch.int32)
    return output, stats, none, none, length, key.shape[-2], seed, offset, debug


@stands_for("aten::_scaled_dot_product_flash_attention_backward")
def flash_backward(recorder: Any, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Temporaries: dq in fp32 and a float a row (flash: rows rounded to 128); with grouped queries
    the gradients of key and value at all heads before they are summed."""
    _, query, key, value = args[:4]
    batch, heads, length, depth = query.shape
    cudnn = recorder.target.prefers_cudnn_attention
    rows = length if cudnn else -(-length // 128) * 128
    width = depth if cudnn else -(-depth // 32) * 32
    results = tuple(_like_bshd(x) for x in (query, key, value))
    for x in results:
        recorder.track(x, func)
    sizes = [batch * heads * rows * 4, batch * rows * heads * width * 4]
    if key.shape[1] != heads:
        sizes += [batch * key.shape[2] * heads * depth * key.element_size()] * 2
    if cudnn:
        sizes = [sum(sizes) + _CUDNN_MARGIN_BYTES]  # cuDNN's plan: one workspace
    made = [recorder.begin("flash_attention_backward", size, "float32") for size in sizes]
    for event in made:
        recorder.end(event)
    return results


@stands_for("aten::_scaled_dot_product_efficient_attention")
def efficient(recorder: Any, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Saved: output, log-sum-exp fp32 [B, H, S rounded to 32] when a backward is to come."""
    query, _, value = args[:3]
    batch, heads, length, _ = query.shape
    output = _like_bshd(query, value.shape[-1])
    rows = -(-length // 32) * 32 if args[4] else 0
    stats = query.new_empty((batch, heads, rows), dtype=torch.float32)
    seed = query.new_empty((), dtype=torch.int64)
    return output, stats, seed, query.new_empty((), dtype=torch.int64)


@stands_for("aten::_scaled_dot_product_efficient_attention_backward")
def efficient_backward(recorder: Any, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Temporaries: a float a row (`delta`), and dq in fp32 when the output is 16 bits."""
    _, query, key, value, bias = args[:5]
    batch, heads, length, depth = query.shape
    made = [recorder.begin("efficient_attention_backward", batch * heads * length * 4)]
    if query.element_size() == 2:
        size = batch * heads * length * depth * 4
        made.append(recorder.begin("efficient_attention_backward", size))
    wants_bias = bias is not None and args[10][3]
    results: list[torch.Tensor | None] = [_like_bshd(x) for x in (query, key, value)]
    results.append(torch.empty_like(bias) if wants_bias else None)
    for x in results:
        if x is not None:
            recorder.track(x, func)
    for event in made:
        recorder.end(event)
    return tuple(results)
