"""Events of one spec from those of others: equal, event by event, to a trace of its own."""

from __future__ import annotations

import time
from typing import Any

import pytest

from planner.errors import UnsupportedError
from planner.spec import RunSpec
from probes.dry.events import Trace
from probes.dry.exact import required_bytes
from probes.dry.reuse import reusable
from probes.dry.trace import trace
from tests.probes.dry.conftest import make_spec


def _rows(run: Trace) -> list[tuple[Any, ...]]:
    return [(e.kind, e.op, e.module, e.phase, e.shape, e.size_bytes, e.category)
            for e in run.events]  # fmt: skip


def _at(spec: RunSpec, batch: int, length: int) -> RunSpec:
    return spec.model_copy(update={"micro_batch_size": batch, "sequence_length": length})


@pytest.mark.parametrize(
    "values",
    [
        {},
        pytest.param({"gradient_checkpointing": True}, marks=pytest.mark.slow),
        pytest.param({"attention": "eager"}, marks=pytest.mark.slow),
    ],
    ids=["plain", "checkpointed", "eager"],
)  # fmt: skip
def test_reused_events_are_those_of_a_trace(llama: Any, values: dict[str, Any]) -> None:
    llama.num_hidden_layers = 1
    spec = make_spec(quantization="none", **values)
    family = reusable(spec, (2, 8), (128, 512), config=llama)
    for batch, length in ((3, 384), (8, 128)):
        own = trace(_at(spec, batch, length), config=llama)
        reused = family.at(batch, length)
        assert _rows(reused) == _rows(own)
        assert reused.peak_allocated_bytes == own.peak_allocated_bytes
        assert required_bytes(reused) == required_bytes(own)


def test_reuse_is_faster_than_a_trace(llama: Any) -> None:
    llama.num_hidden_layers = 4
    spec = make_spec(quantization="none")
    family = reusable(spec, (2, 8), (256, 256), config=llama)
    started = time.process_time()
    reused = family.at(4, 256)
    taken = time.process_time() - started
    assert reused.peak_live_bytes > family.base.peak_live_bytes
    assert taken < family.base.seconds / 5


def test_a_kernel_chosen_by_rows_refuses_the_range(llama: Any) -> None:
    with pytest.raises(UnsupportedError, match="traces differ"):
        reusable(make_spec(quantization="nf4"), (1, 64), (128, 128), config=llama)


def test_nothing_beyond_the_range_is_answered(llama: Any) -> None:
    llama.num_hidden_layers = 1
    family = reusable(make_spec(quantization="none"), (2, 4), (128, 256), config=llama)
    for pair in ((5, 256), (2, 512), (2, 200)):
        with pytest.raises(UnsupportedError, match="trace it"):
            family.at(*pair)
