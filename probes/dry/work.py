"""The work of traced operations, counted as the planner counts it: FLOPs, bytes that arithmetic
cannot hide, and kernel launches."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import flop_registry

from planner.memory.step import StepWork
from planner.memory.work import RIDGE_FLOPS_PER_BYTE, Work

_FREE = ("aten::empty", "aten::new_empty", "aten::detach", "aten::_unsafe_view", "aten::empty_like",
         "aten::empty_strided", "profiler::")  # fmt: skip
_SDPA_FORWARD = {
    "aten::_scaled_dot_product_flash_attention": 4,
    "aten::_scaled_dot_product_efficient_attention": 6,
    "aten::_scaled_dot_product_flash_attention_backward": 11,
    "aten::_scaled_dot_product_efficient_attention_backward": 11,
}  # position of is_causal: half of the products are left out


class Counter:
    """Sums operations into the part of the step that runs: a micro batch, or the update."""

    def __init__(self) -> None:
        self.micro_batch, self.optimizer = Work(), Work()
        self._views: dict[Any, bool] = {}

    def begin_micro_batch(self) -> None:
        """Only the last one counts, as all are alike, and the clipping and update after it."""
        self.micro_batch, self.optimizer = Work(), Work()

    @property
    def step(self) -> StepWork:
        return StepWork(self.micro_batch, self.optimizer)

    def count(self, phase: str, func: Any, args: tuple, kwargs: dict[str, Any], out: Any) -> None:
        """Add one operation of `phase`."""
        work = self._of(phase)
        if work is None or self._is_free(func):
            return
        work.launches += 1
        flops = _flops(func, args, kwargs, out)
        traffic = _traffic(args, out)
        if flops:
            dtype = next(x.dtype for x in args if isinstance(x, torch.Tensor))
            if dtype is torch.float32:
                work.flops_fp32 += flops
            else:
                work.flops_16bit += flops
            traffic = max(0, traffic - flops // RIDGE_FLOPS_PER_BYTE)
        work.traffic_bytes += traffic

    def count_kernel(self, phase: str, args: tuple) -> None:
        """A generated kernel: its operands once, no products."""
        work = self._of(phase)
        if work is not None:
            work.launches += 1
            work.traffic_bytes += _traffic(args, None)

    def _of(self, phase: str) -> Work | None:
        if phase in ("forward", "backward", "recompute"):
            return self.micro_batch
        return self.optimizer if phase in ("clip", "optimizer") else None

    def _is_free(self, func: Any) -> bool:
        found = self._views.get(func)
        if found is None:
            name = func._schema.name
            found = self._views[func] = func.is_view or name.startswith(_FREE)
        return found


def _flops(func: Any, args: tuple, kwargs: dict[str, Any], out: Any) -> int:
    name = func._schema.name
    if name == "bitsandbytes::gemm_4bit":
        return 2 * args[0].numel() * args[2][0]
    if name.startswith("bitsandbytes::int8") and "mm" in name:
        codes, weights = (args[1], args[2]) if "mixed" in name else (args[0], args[1])
        return 2 * codes.numel() * weights.shape[0]
    formula = flop_registry.get(func._overloadpacket)
    if formula is None:
        return 0
    position = _SDPA_FORWARD.get(name)
    operands = _at_all_heads(args) if position is not None else args
    flops = int(formula(*operands, **kwargs, out_val=out))
    causal = position is not None and len(args) > position and args[position]
    return flops // 2 if causal else flops


def _at_all_heads(args: tuple) -> tuple:
    """Shapes of [B, H, S, D] operands with grouped keys and values at every head, which torch
    2.11's formula asks for."""
    heads = max(x.shape[1] for x in args if isinstance(x, torch.Tensor) and x.dim() == 4)
    return tuple(
        (x.shape[0], heads, *x.shape[2:]) if isinstance(x, torch.Tensor) and x.dim() == 4 else x
        for x in args
    )


def _traffic(args: tuple, out: Any) -> int:
    """Bytes of every operand and result once."""
    total = 0
    for x in (*args, *(out if isinstance(out, (tuple, list)) else (out,))):
        if isinstance(x, torch.Tensor):
            total += x.numel() * x.element_size()
        elif isinstance(x, (list, tuple)):
            total += sum(
                y.numel() * y.element_size() for y in pytree.tree_leaves(x)
                if isinstance(y, torch.Tensor)
            )  # fmt: skip
    return total
