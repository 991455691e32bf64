"""The sweep end to end on the CPU: outcomes, resuming, and a kill at any moment."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from planner.cli import main
from planner.errors import VramwiseError
from probes import cli
from probes.driver import BusyDeviceError, Card, refuse_if_busy
from probes.grid import read_campaign
from probes.store import read
from probes.worker import Worker

_HEAD = 'model="facebook/chameleon-7b"\noptimizer="adamw_torch"\nsteps=2\nwarmup_steps=1\n'
_FIFTY = (
    _HEAD.replace("facebook/chameleon-7b", "Qwen/Qwen2.5-0.5B")
    + 'quantization="none"\n'
    + "[grid]\nsequence_length=[{}]\ngradient_checkpointing=[true,false]\n".format(
        ",".join(str(8 + i) for i in range(25))
    )
)


def campaign(tmp_path: Path, text: str) -> list[str]:
    path = tmp_path / "c.toml"
    path.write_text(text, encoding="utf-8")
    return [str(path), "--cpu", "--store", str(tmp_path / "store")]


@pytest.mark.slow
def test_outcomes_are_records_and_a_second_run_adds_none(tmp_path: Path) -> None:
    """ok, and a target that the model lacks; then nothing is left to do."""
    text = _HEAD + '[[grids]]\npoints=[{}, {"lora.target_modules"=["nosuch"]}]'
    arguments = campaign(tmp_path, text)
    assert cli.run(arguments) == 0
    records, faults = read(tmp_path / "store")
    assert not faults
    assert sorted(r.outcome for r in records) == ["ok", "skipped"]
    ok = next(r for r in records if r.outcome == "ok")
    assert ok.environment is not None
    assert ok.meters is not None
    assert ok.meters.parameters_trainable > 0
    skipped = next(r for r in records if r.outcome == "skipped")
    assert "nosuch" in (skipped.evidence or "")
    started = time.monotonic()
    assert cli.run(arguments) == 0
    assert len(read(tmp_path / "store")[0]) == 2
    assert time.monotonic() - started < 5, "a done campaign started a child"


@pytest.mark.slow
def test_probe_that_takes_too_long_is_killed_and_the_rest_goes_on(tmp_path: Path) -> None:
    """64 x 4096 tokens take a CPU far longer than the limit; the small one is within it."""
    text = _HEAD + "order='file'\n[[grids]]\npoints=["
    text += "{micro_batch_size=64, sequence_length=4096, steps=64}, {sequence_length=16}]"
    assert cli.run([*campaign(tmp_path, text), "--timeout", "12"]) == 0
    outcomes = [r.outcome for r in read(tmp_path / "store")[0]]
    assert outcomes == ["timeout", "ok"]


@pytest.mark.slow
def test_child_that_dies_is_told_with_how(tmp_path: Path) -> None:
    """What the kernel does to a process that takes too much memory: SIGKILL in mid-probe."""
    text = _HEAD + "micro_batch_size=64\nsequence_length=4096\n"
    (point,) = read_campaign(campaign(tmp_path, text)[0], {}).points
    worker = Worker(None, tmp_path / "log")
    try:
        assert worker.next_event(120)["event"] == "ready"
        probe = {"key": point.key, "spec": point.spec.model_dump(mode="json"),
                 "options": point.options.model_dump(mode="json")}  # fmt: skip
        worker.send({"gpu": None, "weights": "random", "tiny": True, "others_used_bytes": 0,
                     "deadline_s": None, "probes": [probe]})  # fmt: skip
        while worker.next_event(120)["event"] != "begin":
            pass
        worker.process.send_signal(signal.SIGKILL)
        event = worker.next_event(60)
    finally:
        worker.close()
    assert event["event"] == "died"
    assert "SIGKILL" in event["evidence"]


@pytest.mark.slow
def test_sweep_killed_at_random_moments_ends_with_each_probe_once(tmp_path: Path) -> None:
    """Two sweeps on one store, killed and started again until all 50 are there."""
    arguments = campaign(tmp_path, _FIFTY)
    generator = random.Random(5)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "planner.cli", "probe", "--share-loads", *arguments]
    for attempt in range(12):
        sweeps = [
            subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
            for _ in range(2 if attempt == 0 else 1)
        ]
        if attempt < 2:
            time.sleep(generator.uniform(9, 13))
            for sweep in sweeps:
                sweep.send_signal(signal.SIGKILL)
        codes = [sweep.wait(timeout=120) for sweep in sweeps]
        if codes == [0]:
            break
    records, faults = read(tmp_path / "store")
    assert not faults
    keys = [record.key for record in records]
    assert len(keys) == len(set(keys)) == 50
    assert {record.outcome for record in records} == {"ok"}
    shapes = {(r.spec.sequence_length, r.spec.gradient_checkpointing) for r in records}
    assert len(shapes) == 50


def test_a_point_has_a_process_of_its_own_unless_loads_are_shared(tmp_path: Path) -> None:
    found = [read_campaign(campaign(tmp_path, _FIFTY)[0], {})]
    alone, _ = cli._groups(found, set(), shared=False)
    shared, _ = cli._groups(found, set(), shared=True)
    assert {len(group.points) for group in alone} == {1}
    assert len(alone) == 50 > len(shared)
    assert sorted(p.key for g in alone for p in g.points) == sorted(
        p.key for g in shared for p in g.points
    )


def test_without_a_gpu_it_says_what_and_why_and_what_instead(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("probes.cli.find_cards", list)
    assert main(["probe", *campaign(tmp_path, _FIFTY)[:1]]) == 2
    said = capsys.readouterr()
    assert "50 probes" in said.out
    assert "--dry" in said.err
    assert "--cpu" in said.err
    with pytest.raises(VramwiseError):
        cli.run(campaign(tmp_path, _FIFTY)[:1])


def test_busy_card_is_refused_with_what_was_found() -> None:
    """A card that NVML would report so; it does not exist here, and nobody asks it again."""
    card = Card(0, "NVIDIA H200", 150_754_820_096, 9 << 30, 97, (4711,))
    with pytest.raises(BusyDeviceError) as error:
        refuse_if_busy(card, patience_s=-1.0)
    assert "9.00 GiB" in str(error.value)
    assert "4711" in str(error.value)
    idle = Card(0, "NVIDIA H200", 150_754_820_096, 1 << 20, 0, ())
    assert refuse_if_busy(idle) is idle
