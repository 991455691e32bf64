"""A used process measures as a fresh one does; what a run leaves behind is put back."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch

from planner.spec import RunSpec
from probes.harness import OutOfMemoryError, Session
from probes.meters import CpuMeter
from probes.records import Meters, Options
from tests.probes.tiny import config, spec

OPTIONS = Options(steps=3, warmup_steps=1)
LAST = {"lora": {"target_modules": ["lm_head"], "rank": 4}, "sequence_length": 64}

_FRESH = """
import json, sys
from planner.spec import spec_from_mapping
from probes.harness import Session
from probes.meters import CpuMeter
from tests.probes.test_harness import OPTIONS
from tests.probes.tiny import config
wanted = spec_from_mapping(json.loads(sys.argv[1]))
session = Session(wanted, config(), CpuMeter().start())
print("ANSWER" + session.measure(wanted, OPTIONS).model_dump_json())
"""


@pytest.fixture
def meter() -> Iterator[CpuMeter]:
    counter = CpuMeter().start()
    yield counter
    counter.stop()


def measured_fresh(wanted: RunSpec) -> Meters:
    """The same spec as the first and only one of its own process."""
    answer = subprocess.run(
        [sys.executable, "-c", _FRESH, wanted.model_dump_json()],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    line = next(x for x in answer.stdout.splitlines() if x.startswith("ANSWER"))
    return Meters(**json.loads(line.removeprefix("ANSWER")))


def sizes(meters: Meters) -> dict[str, int]:
    """Every byte that the CPU's meter knows exactly; the first step's are left out of nothing."""
    peaks = {name: phase.peak_allocated_bytes for name, phase in meters.phases.items()}
    peaks.pop("load")
    return {**peaks, "resident": meters.resident_bytes, "peak": meters.peak_allocated_bytes}


@pytest.mark.slow
def test_used_process_measures_as_a_fresh_one(meter: CpuMeter) -> None:
    """The traps: checkpointing's input hook, Trainer's wrapped forward, an out-of-memory midway.

    Equal to a block of the caching allocator (512 bytes): the image run leaves a cached mapping.
    """
    quantization = "nf4"
    wanted = spec(quantization=quantization, **LAST)
    session = Session(wanted, config(), meter)
    before = {"gradient_checkpointing": True, "images_per_sample": 1, "evaluation_batch_size": 2}
    session.measure(spec(quantization=quantization, **before), OPTIONS)
    meter.cap(meter.levels().allocated + 200_000)
    with pytest.raises(OutOfMemoryError):
        session.measure(spec(quantization=quantization, sequence_length=256), OPTIONS)
    used, fresh = sizes(session.measure(wanted, OPTIONS)), sizes(measured_fresh(wanted))
    assert used.keys() == fresh.keys()
    assert {name: used[name] - fresh[name] for name in used if abs(used[name] - fresh[name]) > 512
            } == {}  # fmt: skip


def test_bisection_on_the_cpu_finds_the_peak_itself(meter: CpuMeter) -> None:
    """Without a caching allocator, what is required is what is allocated at the peak."""
    wanted = spec()
    found = Session(wanted, config(), meter).measure(wanted, Options(steps=3, bisect=True))
    assert found.capacity is not None
    assert found.capacity.passed_cap_bytes == found.peak_allocated_bytes


def test_resident_bytes_are_the_tensors_that_are_there(meter: CpuMeter) -> None:
    wanted = spec(quantization="none")
    session = Session(wanted, config(), meter)
    assert session.base is not None
    tensors = [*session.base.parameters(), *session.base.buffers()]
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}
    found = session.measure(wanted, OPTIONS)
    adapters = found.parameters_trainable * 4
    assert found.resident_bytes == pytest.approx(sum(storages.values()) + adapters, rel=0.01)


def test_optimizer_states_show_where_they_live(meter: CpuMeter) -> None:
    """AdamW keeps two fp32 numbers a trained parameter, from the first step on; SGD keeps none."""
    adam, sgd = spec(optimizer="adamw_torch"), spec(optimizer="sgd")
    session = Session(adam, config(), meter)
    ends = {
        wanted.optimizer: session.measure(wanted, OPTIONS).phases["between"].end_allocated_bytes
        for wanted in (adam, sgd)
    }
    states = 2 * 4 * session_trainable(session, adam)
    assert ends["adamw_torch"] - ends["sgd"] == pytest.approx(states, rel=0.01)


def session_trainable(session: Session, wanted: RunSpec) -> int:
    """Trained parameters of a spec, from its own measurement."""
    return session.measure(wanted, OPTIONS).parameters_trainable


def test_saved_tensors_are_told_by_module(meter: CpuMeter) -> None:
    wanted = spec(quantization="none")
    options = Options(steps=3, warmup_steps=1, saved_tensors=True)
    saved = Session(wanted, config(), meter).measure(wanted, options).saved_tensors_bytes
    assert saved is not None
    assert saved["Dropout"] > 0
    checkpointed = spec(quantization="none", gradient_checkpointing=True)
    session = Session(checkpointed, config(), meter)
    less = session.measure(checkpointed, options).saved_tensors_bytes
    assert less is not None
    assert sum(less.values()) < sum(saved.values())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_used_process_measures_as_a_fresh_one_on_a_gpu() -> None:
    """Reserved and required bytes too, which the CPU has not; in a child, as the sweep runs it."""
    from tests.probes.on_gpu import fresh_and_used

    fresh, used = fresh_and_used()
    for name in ("resident_bytes", "peak_allocated_bytes", "peak_reserved_bytes"):
        assert getattr(used, name) == pytest.approx(getattr(fresh, name), rel=0.005), name
    assert used.capacity.passed_cap_bytes == pytest.approx(
        fresh.capacity.passed_cap_bytes, rel=0.02
    )
