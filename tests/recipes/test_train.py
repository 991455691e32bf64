"""Whole runs on the tiny Chameleon: resuming, kills, full disks, corrupt checkpoints, NaN."""

from __future__ import annotations

import errno
import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from planner.errors import InputError, VramwiseError
from planner.spec import spec_from_mapping
from recipes import checkpoints as store
from recipes.checkpoints import CheckpointError, checkpoints, load_checkpoint, save_checkpoint
from recipes.data.encoding import pixels
from recipes.demo import demo_spec
from recipes.demo_data import demo_config, demo_tokenizer, pictures, write_demo_data
from recipes.demo_model import write_demo_model
from recipes.killing import kill_once_saved
from recipes.report import run
from recipes.train import Run
from recipes.training_loop import TrainingError

STEPS = 6


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[Path, Path, Path]:
    """(train, test, model) of a very small demo."""
    folder = tmp_path_factory.mktemp("demo")
    train, test = write_demo_data(folder, 24, 8, 0)
    tokenizer = demo_tokenizer()
    some = torch.stack([pixels(p.png, 32) for p in pictures(16, 0)])
    return (
        train,
        test,
        write_demo_model(folder / "model", demo_config(tokenizer), tokenizer, some, 0),
    )


def _spec(made, **changes):
    spec = demo_spec(*made, STEPS)
    schedule = spec.schedule.model_copy(update={"save_every_steps": 2, **changes})
    lora = spec.lora.model_copy(update={"dropout": 0.1})
    changed = {"schedule": schedule, "lora": lora, "micro_batch_size": 4, "method": "lora"}
    return spec.model_copy(update=changed)


def _run(made, folder: Path, **changes) -> Run:
    return Run(_spec(made, **changes), folder, device="cpu", weights=made[2])


def test_a_stopped_run_goes_on_bit_for_bit(made, tmp_path) -> None:
    whole = _run(made, tmp_path / "whole").train()
    _run(made, tmp_path / "parts").train(stop_after=3)  # its newest checkpoint is of step 2
    parts = _run(made, tmp_path / "parts").train()
    assert len(whole) == STEPS
    assert parts == whole
    lines = (tmp_path / "parts/losses.jsonl").read_text().splitlines()
    assert [json.loads(line)["loss"] for line in lines] == whole


@pytest.mark.slow
def test_a_killed_run_goes_on_bit_for_bit(made, tmp_path) -> None:
    whole = _run(made, tmp_path / "whole").train()
    spec = tmp_path / "spec.json"
    spec.write_text(_spec(made).model_dump_json(exclude_none=True), encoding="utf-8")
    output = tmp_path / "killed"
    command = [sys.executable, "-m", "planner.cli", "train", str(spec), "--output", str(output),
               "--device", "cpu", "--weights", str(made[2])]  # fmt: skip
    assert kill_once_saved(command, output / "checkpoints", OMP_NUM_THREADS="1")
    assert checkpoints(output / "checkpoints")
    assert _run(made, output).train() == whole


def test_a_corrupt_checkpoint_is_told_and_kept(made, tmp_path) -> None:
    _run(made, tmp_path).train(stop_after=4)
    newest = checkpoints(tmp_path / "checkpoints")[-1]
    bytes_ = bytearray(newest.path.read_bytes())
    bytes_[len(bytes_) // 2] ^= 1
    newest.path.write_bytes(bytes_)
    with pytest.raises(CheckpointError, match=r"step-00000004\.pt is corrupt.*step 2"):
        _run(made, tmp_path).train()
    assert newest.path.read_bytes() == bytes_


def test_a_half_written_state_is_no_checkpoint(made, tmp_path) -> None:
    _run(made, tmp_path).train(stop_after=2)
    (tmp_path / "checkpoints/step-00000004.pt.partial").write_bytes(b"half")
    (tmp_path / "checkpoints/step-00000004.pt").write_bytes(b"no record yet")
    found = load_checkpoint(tmp_path / "checkpoints")
    assert found is not None
    assert found[0].step == 2


def test_a_full_disk_is_told_and_loses_nothing(tmp_path, monkeypatch) -> None:
    first = save_checkpoint(tmp_path, 1, {"x": torch.ones(3)})

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(store.os, "fsync", full)
    with pytest.raises(CheckpointError, match="disk is full; the one of step 1 is whole"):
        save_checkpoint(tmp_path, 2, {"x": torch.ones(3)})
    assert [c.step for c in checkpoints(tmp_path)] == [1]
    assert first.path.is_file()
    assert not list(tmp_path.glob("*.partial"))


def test_only_the_newest_checkpoints_are_kept(tmp_path) -> None:
    for step in range(1, 6):
        save_checkpoint(tmp_path, step, {"x": torch.tensor(step)})
    assert [c.step for c in checkpoints(tmp_path)] == [3, 4, 5]
    assert len(list(tmp_path.glob("*.pt"))) == 3


def test_a_loss_that_is_no_number_stops_the_run(made, tmp_path) -> None:
    run_ = _run(made, tmp_path)
    run_.train(stop_after=2)
    with torch.no_grad():
        run_.lean.trained[0].fill_(float("nan"))
    with pytest.raises(TrainingError, match=r"loss is nan at step 3: step-00000002 is kept"):
        run_.train()
    assert len(checkpoints(tmp_path / "checkpoints")) == 1


def test_another_spec_does_not_take_up_a_folder(made, tmp_path) -> None:
    _run(made, tmp_path).train(stop_after=2)
    with pytest.raises(CheckpointError, match="another spec"):
        _run(made, tmp_path, learning_rate=1e-3).train()


def test_a_resumed_run_reports_the_pace_of_its_own_steps(made, tmp_path) -> None:
    _run(made, tmp_path).train(stop_after=4)
    report = run(_spec(made), tmp_path, device="cpu", weights=made[2])
    assert report.step_seconds == pytest.approx(report.seconds / (STEPS - 4))


def test_the_report_and_its_files(made, tmp_path) -> None:
    report = run(_spec(made), tmp_path, device="cpu", weights=made[2])
    assert report.steps == STEPS
    assert report.base is not None
    assert report.base.questions == 8
    assert report.p_value is not None
    names = {path.name for path in tmp_path.iterdir()}
    assert names >= {"report.json", "adapter", "losses.jsonl", "evaluation_results_testing.csv",
                     "evaluation_tuned.csv"}  # fmt: skip
    saved = {path.name for path in (tmp_path / "adapter").iterdir()}
    assert "adapter_model.safetensors" in saved
    assert json.loads((tmp_path / "report.json").read_text())["steps"] == STEPS


def test_the_base_is_judged_without_its_adapters(made, tmp_path) -> None:
    run_ = _run(made, tmp_path)
    before = run_.answers(tuned=False)
    run_.train()
    for now, then in zip(run_.answers(tuned=False), before, strict=True):
        assert now.log_probabilities == pytest.approx(then.log_probabilities)
    assert run_.answers()[0].log_probabilities != before[0].log_probabilities


def test_training_without_data_is_refused() -> None:
    spec = spec_from_mapping({"model": "chameleon-7b", "stack": "lean"})
    with pytest.raises(InputError, match=r"data\.source"):
        Run(spec, Path("unused-folder"), device="cpu", tokenizer=demo_tokenizer())
    Path("unused-folder").rmdir()


@pytest.mark.parametrize("train", ["rows", "with_adapters"])
def test_a_run_with_new_tokens_and_pruning(made, tmp_path, train) -> None:
    changes = {"vocabulary": {"tokens": 4, "train": train}, "pruning": {"fraction": 0.5}}
    values = _spec(made).model_dump(exclude_none=True) | changes
    said: list[str] = []
    report = run(spec_from_mapping(values), tmp_path, device="cpu", weights=made[2],
                 say=said.append)  # fmt: skip
    assert report.steps == STEPS
    assert any("pruned" in line for line in said)
    rows = load_file(tmp_path / "new_rows.safetensors")
    config = json.loads((tmp_path / "base/config.json").read_text())
    assert config["intermediate_size"] == 64
    changed = json.loads((tmp_path / "base/changes.json").read_text())
    added = len(changed["vocabulary"]["tokens"])
    assert all(len(values) == added for values in rows.values())


def test_liger_without_liger_is_told(made, tmp_path) -> None:
    spec = _spec(made).model_copy(update={"liger": True})
    with pytest.raises(VramwiseError, match="liger"):
        Run(spec, tmp_path, device="cpu", weights=made[2])


def test_the_stock_stack_trains_on_the_same_data(made, tmp_path) -> None:
    spec = _spec(made, evaluate_every_steps=3).model_copy(update={"stack": "stock"})
    report = run(spec, tmp_path, device="cpu", weights=made[2])
    assert len(report.losses) == STEPS
    assert report.tuned is not None
    more = Run(spec, tmp_path, device="cpu", weights=made[2]).train()  # nothing is left to do
    assert len(more) == STEPS
