"""What the lean stack's own kernels allocate on CUDA (recipes/kernels.py, which needs Triton to be
imported, and the loss that torch generates), for tensors on meta."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

_SPLITS, _BLOCK_ROWS, _MAX_RANK = 4, 64, 128


@contextmanager
def lean_kernels() -> Iterator[None]:
    """The recipes meet these kernels where they would meet theirs."""
    ours = SimpleNamespace(up=_up, add_branch=_add_branch, down_gradient=_down_gradient)
    with (
        mock.patch.dict(sys.modules, {"recipes.kernels": ours}),
        mock.patch("recipes.kernels", ours, create=True),
        mock.patch("recipes.dropout._in_kernels", _in_kernels),
        mock.patch("recipes.loss._entropy_kernel", _entropy_kernel),
    ):
        yield


def _in_kernels(x: Tensor, rank: int) -> bool:
    return rank <= _MAX_RANK and x.numel() < 2**31


def _up(x: Tensor, a: Tensor, seed: Tensor, p: float) -> Tensor:
    """(T, R): partial sums in fp32, one a split of the width, then their sum and its cast."""
    parts = x.new_empty((_SPLITS, x.shape[0], a.shape[0]), dtype=torch.float32)
    return parts.sum(0).to(x.dtype)


def _add_branch(dx: Tensor, du: Tensor, a: Tensor, seed: Tensor, p: float) -> Tensor:
    """In place."""
    return dx


def _down_gradient(du: Tensor, x: Tensor, seed: Tensor, p: float) -> Tensor:
    """(R, K) in fp32: partial sums, one a stretch of rows, then their sum."""
    blocks = -(-x.shape[0] // _BLOCK_ROWS)
    steps = max(4, 1 << (-(-blocks // 32) - 1).bit_length())
    parts = x.new_empty((-(-blocks // steps), du.shape[1], x.shape[1]), dtype=torch.float32)
    return parts.sum(0)


def _entropy_kernel(compiled: bool, softcap: float | None, with_grad: bool) -> Any:
    """Generated for CUDA: a loss and, where wanted, the gradient in the logits' dtype; between
    its reductions only a float a row."""

    def entropy(logits: Tensor, *_: Any) -> tuple[Tensor, Tensor | None]:
        rows = logits.new_empty((logits.shape[0], 1), dtype=torch.float32)
        loss = rows.new_empty(())
        return loss, torch.empty_like(logits) if with_grad else None

    return entropy
