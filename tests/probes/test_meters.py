"""The CPU's storage counter against sizes that are known."""

from __future__ import annotations

import pytest
import torch

from probes.meters import CpuMeter
from probes.phases import PhaseClock, watching


@pytest.fixture
def meter():
    counter = CpuMeter().start()
    yield counter
    counter.stop()


def test_storages_count_once_while_they_live(meter: CpuMeter) -> None:
    base = meter.levels().allocated
    a = torch.zeros(1000, dtype=torch.float32)
    view = a.view(10, 100)[2:]
    assert meter.levels().allocated - base == 4000
    del a
    assert meter.levels().allocated - base == 4000
    del view
    assert meter.levels().allocated == base
    assert meter.levels().peak_allocated - base == 4000


def test_peak_holds_what_autograd_saves(meter: CpuMeter) -> None:
    """relu keeps its output and so does exp: 3 tensors of 4 KB live at the end of the forward."""
    x = torch.zeros(1024, requires_grad=True)
    before = meter.levels().allocated
    meter.reset_peaks()
    y = torch.relu(x * 2).exp()
    assert meter.levels().allocated - before == 2 * 4096
    y.sum().backward()
    del y
    assert x.grad is not None
    assert meter.levels().allocated - before == 4096


def test_cap_refuses_the_operation_that_passes_it(meter: CpuMeter) -> None:
    meter.cap(meter.levels().allocated + 10_000)
    kept = torch.zeros(2000)
    with pytest.raises(torch.OutOfMemoryError):
        torch.zeros(1000)
    meter.cap(None)
    assert torch.zeros(1000).numel() == 1000
    assert kept.numel() == 2000


def test_phases_of_a_plain_loop(meter: CpuMeter) -> None:
    """Each part of a step is told apart in a loop that knows nothing of the clock."""
    model = torch.nn.Linear(64, 64)
    optimizer = torch.optim.AdamW(model.parameters())
    clock = PhaseClock(meter)
    x = torch.ones(8, 64)
    with watching(clock, model):
        clock.begin()
        for _ in range(3):
            model(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            clock.step_end()
        clock.enter(None)
    phases = clock.meters(warmup=1)
    assert {"forward", "backward", "clipping", "optimizer", "between"} <= set(phases)
    assert clock.optimizer_calls == 3
    assert clock.step_seconds(1).count == 2  # type: ignore[union-attr]
    states = 2 * sum(p.numel() * 4 for p in model.parameters())
    assert phases["optimizer"].end_allocated_bytes >= states
    assert torch.Tensor.backward.__module__.startswith("torch")
