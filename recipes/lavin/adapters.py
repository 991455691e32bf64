"""The mixture-of-modality adapter: one way down, two ways up, mixed by a router.

Shapes: N samples, S positions, d the layer's width, r the bottleneck, g groups.

    h = dropout(A x)                          A: d -> r                    d r + r parameters
    y = x + s (w0 B(h) + w1 D(h))             B, D: r -> d in g groups     2 (d r / g + d)
    w = softmax(R(x of the first position) / t)   R: d -> 2                2 d + 2

B and D start at zero, so that an adapter starts as the identity. The first position is the modality
token in the language model and the class token in the vision tower. With r 8 and g 2 an adapter has
20 d + 10 parameters.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recipes.lavin.config import LavinConfig


class GroupedLinear(nn.Module):
    """Each of `groups` equal slices of the input makes its own slice of the output: a convolution
    of kernel 1 with groups. Zero at the start."""

    def __init__(self, inputs: int, outputs: int, groups: int) -> None:
        super().__init__()
        if inputs % groups or outputs % groups:
            raise ValueError(f"{inputs} -> {outputs} is not divisible into {groups} groups")
        self.weight = nn.Parameter(torch.zeros(groups, outputs // groups, inputs // groups))
        self.bias = nn.Parameter(torch.zeros(outputs))

    def dense(self) -> Tensor:
        """(outputs, inputs): the slices' weights along the diagonal, zeros elsewhere."""
        return torch.block_diag(*self.weight)

    def forward(self, h: Tensor) -> Tensor:
        return F.linear(h, self.dense(), self.bias)


class Router(nn.Module):
    """Weights of the two ways up, (N, 1, 2), from the first position of each sample; with
    `across_batch` (1, S, 2), each position's from the first sample, as published for the tower.

    `last`: the weights of the newest forward, detached, for reports.
    """

    def __init__(self, width: int, temperature: float, across_batch: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(width, 2)
        self.temperature, self.across_batch = temperature, across_batch
        self.last: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        logits = self.linear(x[0] if self.across_batch else x[:, 0])
        weights = torch.softmax(logits / self.temperature, dim=-1)
        self.last = weights.detach()
        return weights.unsqueeze(0 if self.across_batch else 1)


class MixtureOfModalityAdapter(nn.Module):
    """x (N, S, d) -> x and its adaptation. Parameters are fp32; what they compute is in the dtype
    that autocast gives `down`."""

    def __init__(self, width: int, config: LavinConfig, across_batch: bool = False) -> None:
        super().__init__()
        r = config.bottleneck
        self.down = nn.Linear(width, r)
        self.up = nn.ModuleList(GroupedLinear(r, width, config.groups) for _ in range(2))
        self.router = Router(width, config.temperature, across_batch)
        self.dropout = nn.Dropout(config.dropout)
        self.scale, self.routing = config.scale, config.routing
        nn.init.xavier_uniform_(self.down.weight)
        nn.init.zeros_(self.down.bias)

    def forward(self, x: Tensor) -> Tensor:
        h = self.dropout(self.down(x))
        w = (self.scale * self.router(x)).to(h.dtype)
        w0, w1 = w[..., :1], w[..., 1:]
        if self.routing == "bottleneck":
            return x + self._mixed_below(h, w0, w1)
        return x + (w0 * self.up[0](h) + w1 * self.up[1](h))

    def _mixed_below(self, h: Tensor, w0: Tensor, w1: Tensor) -> Tensor:
        """w0 B(h) + w1 D(h) = [B D] [w0 h; w1 h] + w0 b + w1 d: the weights meet h, of r columns,
        and nothing as wide as the layer is kept for their gradient."""
        first, second = self.up
        both = torch.cat([first.dense(), second.dense()], dim=1)  # type: ignore[operator]
        bias = w0 * first.bias.to(h.dtype) + w1 * second.bias.to(h.dtype)  # type: ignore[operator]
        return F.linear(torch.cat([w0 * h, w1 * h], dim=-1), both) + bias


class AdaptedNorm(nn.Module):
    """A frozen layer's norm, and the adapter that its output passes through."""

    def __init__(self, norm: nn.Module, adapter: MixtureOfModalityAdapter) -> None:
        super().__init__()
        self.norm, self.adapter = norm, adapter

    def forward(self, x: Tensor) -> Tensor:
        return self.adapter(self.norm(x))


def adapter_parameters(width: int, bottleneck: int = 8, groups: int = 2) -> int:
    """Parameters of one adapter, as the module's docstring counts them."""
    r = bottleneck
    return (width * r + r) + 2 * (width * r // groups + width) + (2 * width + 2)


def standard_deviation(width: int) -> float:
    """Of a learned token's start: a row of length about one."""
    return 1 / math.sqrt(width)
