"""Whole LaVIN runs: resumed, killed, judged; and the demo, which must learn both modalities."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch

from planner.cli import main
from planner.errors import InputError
from recipes.checkpoints import CheckpointError
from recipes.lavin.cli import CONFIGS
from recipes.lavin.demo import as_json, demo
from recipes.lavin.spec import lavin_spec
from recipes.lavin.train import LavinRun, run_lavin
from recipes.spec_file import read_spec
from tests.recipes.lavin.tiny import tiny_spec


@pytest.fixture(autouse=True)
def _one_thread():
    """Sums of a resumed run in the order of the whole one's."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def values(tmp_path_factory):
    return tiny_spec(tmp_path_factory.mktemp("lavin"))


def _run(values, output: Path) -> LavinRun:
    return LavinRun(*lavin_spec(values), output, device="cpu")


def test_a_stopped_run_goes_on_bit_for_bit(values, tmp_path) -> None:
    whole = _run(values, tmp_path / "whole").train()
    _run(values, tmp_path / "parts").train(stop_after=3)
    assert _run(values, tmp_path / "parts").train() == whole
    assert len(whole) == 6
    lines = (tmp_path / "parts/losses.jsonl").read_text().splitlines()
    assert [json.loads(line)["loss"] for line in lines] == whole


def test_the_report_of_a_run(values, tmp_path) -> None:
    report = run_lavin(_run(values, tmp_path))
    assert len(report.losses) == 6
    assert report.after["AVG"].total == 12
    rows = {row["adapter"]: row for row in report.routing}
    assert len(rows) == 9
    for name, row in rows.items():
        assert sum(row["picture"]) == pytest.approx(1, abs=1e-5)
        assert (row["text"] is None) == name.startswith("vision")
    assert json.loads((tmp_path / "report.json").read_text())["steps"] == 6


def test_the_published_batch_behaviour_trains(values, tmp_path) -> None:
    changed = values | {"lavin": values["lavin"] | {"published_batch": True}}
    report = run_lavin(_run(changed, tmp_path))
    assert report.after["IMG"].total > 0


def test_another_spec_does_not_take_up_a_folder(values, tmp_path) -> None:
    _run(values, tmp_path).train(stop_after=2)
    changed = values | {"lavin": values["lavin"] | {"bottleneck": 4}}
    with pytest.raises(CheckpointError, match="another spec"):
        _run(changed, tmp_path).train()


def test_all_that_is_wrong_in_a_spec_is_told_at_once(values) -> None:
    wrong = values | {"precision": "fp7", "lavin": {"bottleneck": 0, "routing": "both"}}
    with pytest.raises(InputError) as caught:
        lavin_spec(wrong)
    text = str(caught.value)
    assert all(name in text for name in ("precision", "lavin.bottleneck", "lavin.routing"))


def test_the_shipped_configuration_is_valid() -> None:
    spec, settings = lavin_spec(read_spec("lavin-7b-scienceqa", CONFIGS))
    assert settings.config(spec).visual_tokens == 6


def test_the_verb_names_what_it_knows(capsys) -> None:
    assert main(["lavin", "trian"]) == 2
    assert "did you mean 'train'" in capsys.readouterr().err


@pytest.mark.slow
def test_the_demo_learns_both_modalities_and_survives_a_kill(tmp_path) -> None:
    began = time.perf_counter()
    killed_at, report = demo(tmp_path, lambda text: None, 160, training=2400, questions=600)
    result = as_json(report, killed_at, time.perf_counter() - began)
    assert result["learned"], result["p_above_chance"]
    assert result["after"]["TXT"] > result["before"]["TXT"]
    assert result["after"]["IMG"] > result["before"]["IMG"]
    assert 0 < killed_at < len(report.losses) == 160
    unkilled = _run(json.loads((tmp_path / "spec.json").read_text()), tmp_path / "unkilled")
    assert unkilled.train(stop_after=killed_at + 3) == report.losses[: killed_at + 3]
