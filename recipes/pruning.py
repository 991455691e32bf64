"""Pruning, with its honest effect on memory.

Zeroing weights saves no byte: a dense matrix with zeros is as large and as slow. Taking whole
channels out of the MLPs saves theirs, and costs accuracy that a fine-tune has to win back.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from planner.errors import UnsupportedError


@dataclass(frozen=True, slots=True)
class Pruned:
    """What was done: bytes of all parameters before and after, and the share of them now zero."""

    kind: str
    bytes_before: int
    bytes_after: int
    zero_share: float


@torch.no_grad()
def prune_magnitude(model: nn.Module, fraction: float) -> Pruned:
    """Zero the `fraction` smallest weights of each decoder linear. Saves no memory."""
    before = _bytes(model)
    linears = [m for n, m in model.named_modules() if type(m) is nn.Linear and ".layers." in n]
    if not linears:
        raise UnsupportedError("pruning needs weights that are not quantised")
    for linear in linears:
        flat = linear.weight.abs().flatten()
        count = int(fraction * flat.numel())
        smallest = torch.topk(flat, count, largest=False).indices
        linear.weight.view(-1)[smallest] = 0
    return Pruned("magnitude", before, _bytes(model), _zero_share(model))


@torch.no_grad()
def prune_mlp_channels(model: PreTrainedModel, fraction: float) -> Pruned:
    """Take `fraction` of the channels out of every MLP (gate, up and down projections): those with
    the smallest product of norms. The configuration's intermediate_size follows, so that the model
    saves and loads. Raises UnsupportedError for another layout or quantised weights."""
    before = _bytes(model)
    mlps: list[Any] = [m for m in model.modules() if _is_mlp(m)]
    if not mlps:
        raise UnsupportedError("pruning channels needs unquantised MLPs of gate, up and down")
    kept = 0
    for mlp in mlps:
        gate, up, down = mlp.gate_proj, mlp.up_proj, mlp.down_proj
        weight = gate.weight.norm(dim=1) * up.weight.norm(dim=1) * down.weight.norm(dim=0)
        kept = _kept(gate.out_features, fraction)
        chosen = torch.topk(weight.float(), kept).indices.sort().values
        for linear in (gate, up):
            _keep(linear, chosen, 0)
        _keep(down, chosen, 1)
        mlp.intermediate_size = kept
    model.config.get_text_config().intermediate_size = kept
    return Pruned("mlp_channels", before, _bytes(model), _zero_share(model))


def _kept(channels: int, fraction: float) -> int:
    """Channels left: a multiple of 64 where there are that many, for the matrix units."""
    left = max(1, round(channels * (1 - fraction)))
    return left // 64 * 64 if left >= 64 else left


def _keep(linear: nn.Linear, chosen: Tensor, dim: int) -> None:
    linear.weight = nn.Parameter(
        linear.weight.index_select(dim, chosen), requires_grad=linear.weight.requires_grad
    )
    linear.out_features, linear.in_features = linear.weight.shape
    if dim == 0 and linear.bias is not None:
        linear.bias = nn.Parameter(linear.bias[chosen], requires_grad=linear.bias.requires_grad)


def _is_mlp(module: nn.Module) -> bool:
    names = ("gate_proj", "up_proj", "down_proj")
    return all(type(getattr(module, name, None)) is nn.Linear for name in names)


def _bytes(model: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())


def _zero_share(model: nn.Module) -> float:
    zeros = sum(int((p == 0).sum()) for p in model.parameters())
    return zeros / sum(p.numel() for p in model.parameters())
