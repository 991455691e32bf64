"""What libraries ask before they take their CUDA path, answered for meta tensors as on a card."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from math import prod
from typing import Any
from unittest import mock

import bitsandbytes.functional as bnb_functional
import torch
import transformers.modeling_flash_attention_utils as flash_utils
from transformers import PreTrainedModel
from transformers.integrations import flash_attention
from transformers.utils import generic

from probes.dry.autocast import CudaSemantics

_DEVICES: list[Any] = ["meta", "cuda", "cpu"]
_KERNEL_LISTS = (
    "torch.utils._foreach_utils._get_foreach_kernels_supported_devices",
    "torch.utils._foreach_utils._get_fused_kernels_supported_devices",
    "torch.optim.optimizer._get_foreach_kernels_supported_devices",
    "torch.optim.optimizer._get_fused_kernels_supported_devices",
)


@contextmanager
def cuda_view(semantics: CudaSemantics) -> Iterator[None]:
    """foreach and fused kernels, flash attention and managed memory exist; autocast of "meta" is
    that of CUDA, and a region that switches it off does so."""
    enabled, dtype_of = torch.is_autocast_enabled, torch.get_autocast_dtype
    with ExitStack() as stack:
        for name in _KERNEL_LISTS:
            stack.enter_context(mock.patch(name, return_value=_DEVICES))
        patch = mock.patch.object
        stack.enter_context(
            patch(torch, "is_autocast_enabled", lambda device="cuda": enabled(_cuda(device)))
        )
        stack.enter_context(
            patch(torch, "get_autocast_dtype", lambda device="cuda": dtype_of(_cuda(device)))
        )
        stack.enter_context(patch(torch, "autocast", _autocast_class(semantics, torch.autocast)))
        stack.enter_context(_code(generic.maybe_autocast, _maybe_autocast))
        stack.enter_context(patch(bnb_functional, "get_paged", partial(_paged, semantics.recorder)))
        stack.enter_context(patch(bnb_functional, "fill", lambda *a, **k: None))
        stack.enter_context(patch(bnb_functional, "prefetch_tensor", lambda *a, **k: None))
        stack.enter_context(flash_view())
        stack.enter_context(_quiet("bitsandbytes", "transformers"))
        yield


@contextmanager
def flash_view() -> Iterator[None]:
    """The flash-attn package is taken as installed; its function is ours."""
    patch = mock.patch.object
    with (
        patch(PreTrainedModel, "_flash_attn_import_error", lambda *a, **k: None),
        patch(flash_utils, "_lazy_imports", lambda *a, **k: (_flash, _varlen, None, None, None)),
        patch(flash_utils, "_loaded_implementation", None),
        patch(flash_attention, "_use_top_left_mask", False),
    ):
        yield


@contextmanager
def _quiet(*names: str) -> Iterator[None]:
    """Their advice is for a run that trains (once a call, here)."""
    loggers = [logging.getLogger(name) for name in names]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


def _cuda(device: Any) -> str:
    name = str(device).partition(":")[0]
    return "cuda" if name == "meta" else name


def _autocast_class(semantics: CudaSemantics, real: Any) -> Any:
    def autocast(device_type: str, dtype: Any = None, enabled: bool = True, **rest: Any) -> Any:
        if device_type not in ("meta", "cuda"):
            return real(device_type, dtype=dtype, enabled=enabled, **rest)
        return semantics.autocast(dtype or torch.get_autocast_dtype("cuda")) if enabled else (
            semantics.without_autocast()
        )  # fmt: skip

    return autocast


def _maybe_autocast(
    device_type: str, dtype: Any = None, enabled: bool = True, cache_enabled: Any = None
) -> Any:
    """transformers' function of the same name, which leaves meta alone."""
    import torch

    if torch.is_autocast_enabled(device_type) or enabled:
        return torch.autocast(device_type, dtype=dtype, enabled=enabled)
    from contextlib import nullcontext

    return nullcontext()


@contextmanager
def _code(function: Any, replacement: Any) -> Iterator[None]:
    """Modelling files import the function by name, so its code is what has to change."""
    before = function.__code__
    function.__code__ = replacement.__code__
    try:
        yield
    finally:
        function.__code__ = before


def _paged(
    recorder: Any, *shape: int, dtype: torch.dtype = torch.float32, device: Any = None
) -> torch.Tensor:
    """Managed memory: torch's allocator never sees it. One element stands for all."""
    recorder.paged_bytes += prod(shape) * dtype.itemsize
    tensor = torch.zeros((), dtype=dtype).expand(shape)
    tensor.is_paged, tensor.page_deviceid = True, 0  # type: ignore[attr-defined]
    return tensor


def _flash(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dropout_p: float = 0.0,
    softmax_scale: float | None = None, causal: bool = False, window_size: Any = (-1, -1),
    softcap: float = 0.0, alibi_slopes: Any = None, deterministic: bool = False,
    return_attn_probs: bool = False,
) -> torch.Tensor:  # fmt: skip
    """flash_attn_func: q [B, S, H, D] -> [B, S, H, D]; saves q, k, v, output, log-sum-exp."""
    swapped = [x.transpose(1, 2) for x in (q, k, v)]
    out = torch.ops.aten._scaled_dot_product_flash_attention(
        *swapped, dropout_p, causal, False, scale=softmax_scale
    )
    return out[0].transpose(1, 2)


def _varlen(
    q: Any, k: Any, v: Any, cu_seqlens_q: Any = None, cu_seqlens_k: Any = None,
    max_seqlen_q: Any = None, max_seqlen_k: Any = None, **kwargs: Any,
) -> torch.Tensor:  # fmt: skip
    """flash_attn_varlen_func on packed rows [T, H, D]: one sequence has the same buffers."""
    kwargs = {key: kwargs[key] for key in ("dropout_p", "softmax_scale", "causal") if key in kwargs}
    return _flash(q[None], k[None], v[None], **kwargs)[0]
