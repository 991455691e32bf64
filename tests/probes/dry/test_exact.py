"""`fit --exact`: the trace as a whole answer, for families that the planner does not know too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers

from planner.answer import Estimate
from planner.cli import main
from planner.estimate import estimate
from planner.memory.program import run
from planner.models.registry import load_model
from probes.dry.trace import trace
from tests.probes.dry.conftest import SHAPE, make_spec


def _fit(folder: Path, capsys: Any, *flags: str) -> dict[str, Any]:
    given = ["fit", str(folder), "--gpu", "rtx-3090", "--sequence-length", "256", "--exact"]
    assert main([*given, *flags, "--json"]) == 0
    answer: dict[str, Any] = json.loads(capsys.readouterr().out)
    return answer


def test_a_family_that_the_planner_does_not_know_gets_the_whole_answer(
    tmp_path: Path, capsys: Any
) -> None:
    config = transformers.Olmo2Config(**SHAPE)
    config.to_json_file(tmp_path / "config.json")
    answer = _fit(tmp_path, capsys, "--evaluation-batch-size", "2")
    assert answer.keys() == {*Estimate._fields, "run"}
    model = transformers.AutoModelForCausalLM.from_config(config)
    assert answer["parameters"]["total"] == sum(p.numel() for p in model.parameters())
    assert sum(answer["parameters"]["by_component"].values()) == answer["parameters"]["total"]
    assert answer["basis"] == "traced"
    assert sum(term["bytes"] for term in answer["terms"]) == answer["peak_allocated_bytes"]
    assert max(answer["instants"], key=answer["instants"].__getitem__) == answer["peak_instant"]
    low, high = answer["device_required_interval_bytes"]
    assert low < answer["device_required_bytes"] < high
    assert answer["step_seconds"] > 0
    assert answer["eval_peak_bytes"] > answer["resident_bytes"]


def test_the_text_says_that_it_is_traced(llama: Any, tmp_path: Path, capsys: Any) -> None:
    llama.to_json_file(tmp_path / "config.json")
    assert main(["fit", str(tmp_path), "--gpu", "h200", "--sequence-length", "256", "--exact"]) == 0
    shown = capsys.readouterr().out
    assert "(traced)" in shown
    assert "transformers' own modelling code" in shown


def test_paged_states_are_counted_beside_the_allocators_bytes(
    llama: Any, tmp_path: Path, capsys: Any
) -> None:
    llama.to_json_file(tmp_path / "config.json")
    full = ("--method", "full", "--quantization", "none")
    answer = _fit(tmp_path, capsys, *full, "--optimizer", "paged_adamw_32bit")
    model = transformers.AutoModelForCausalLM.from_config(llama)
    large = sum(p.numel() for p in model.parameters() if p.numel() >= 100_000)  # get_state_buffer
    assert answer["paged_bytes"] == 8 * large


@pytest.mark.parametrize("checkpointed", [False, True])
def test_traced_work_is_the_planners(llama: Any, tmp_path: Path, checkpointed: bool) -> None:
    llama.to_json_file(tmp_path / "config.json")
    spec = make_spec(model=str(tmp_path), gradient_checkpointing=checkpointed)
    traced = trace(spec).work.micro_batch
    modelled = run(spec, load_model(spec.model)).work.micro_batch
    assert traced.flops_16bit == modelled.flops_16bit
    assert traced.launches == pytest.approx(modelled.launches, rel=0.08)
    assert traced.traffic_bytes == pytest.approx(modelled.traffic_bytes, rel=0.2)
    assert traced.hooks == pytest.approx(modelled.hooks, rel=0.08)
    assert bool(traced.hooks) is checkpointed


def test_searched_elements_of_8bit_states_are_the_planners(llama: Any, tmp_path: Path) -> None:
    llama.to_json_file(tmp_path / "config.json")
    spec = make_spec(model=str(tmp_path), optimizer="adamw_8bit", lora={"rank": 64})
    traced, modelled = trace(spec).work, run(spec, load_model(spec.model)).work
    assert traced.optimizer.quantized == modelled.optimizer.quantized > 0


def test_the_card_decides_the_workspaces(llama: Any, tmp_path: Path, capsys: Any) -> None:
    llama.to_json_file(tmp_path / "config.json")
    spec = make_spec(model=str(tmp_path), device="rtx-3090", micro_batch_size=1)
    answer = _fit(tmp_path, capsys)
    assert answer["peak_allocated_bytes"] == pytest.approx(
        estimate(spec).peak_allocated_bytes, rel=0.01
    )
