"""Gradients summed in place under the recorder exactly where torch's engine does so without it:
its profiler tells `add_` from `add`."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from probes.dry.recorder import Recorder
from probes.dry.scope import Scope

Function = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def _fresh_sums_of_torch(function: Function) -> int:
    """Sums of gradients that took a new tensor, on the CPU and without a mode."""
    x, w = torch.rand(64, 64, requires_grad=True), torch.rand(64, 64)
    loss = function(x.exp(), w).sum()
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        loss.backward()
    return sum(event.name == "aten::add" for event in profiled.events())


def _fresh_sums_recorded(function: Function) -> int:
    recorder = Recorder(Scope())
    x = torch.empty(64, 64, device="meta", requires_grad=True)
    w = torch.empty(64, 64, device="meta")
    with recorder:
        loss = function(x.exp(), w).sum()
        made = len(recorder.events)
        with recorder.during("backward"):
            loss.backward()
    return sum(e.kind == "alloc" and e.op == "add" for e in recorder.events[made:])


@pytest.mark.parametrize(
    "function",
    [
        lambda h, w: h.sin() + h.cos(),
        lambda h, w: h @ w + h.sin(),
        lambda h, w: h + h.sin(),
        lambda h, w: (h + h @ w).sin() + h,
        lambda h, w: h.view(-1).sin().view(64, 64) + h.t().cos(),
        lambda h, w: torch.cat([h[:, 32:], h[:, :32]], 1) * h,
        lambda h, w: h.expand(3, 64, 64).sum(0) + h.tanh(),
        lambda h, w: torch.nn.functional.layer_norm(h, (64,)) @ w + h @ w.t() + h.relu(),
    ],
    ids=["fresh", "product", "passed on", "residual", "views", "halves", "expanded", "three"],
)  # fmt: skip
def test_gradients_are_summed_in_place_where_torch_does(function: Function) -> None:
    assert _fresh_sums_recorded(function) == _fresh_sums_of_torch(function)
