"""The check before a run, on the shipped configurations and on settings that cost."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import recipes
from planner.spec import read_mapping, spec_from_mapping
from recipes.build import build
from recipes.checks import check_model, check_precision, check_schedule, checkpoint_bytes
from recipes.cli import expectation, report_text, run
from recipes.demo import demo_spec
from recipes.demo_data import demo_tokenizer, write_demo_data
from recipes.layers import decoder_layers
from recipes.lean import reached_layers
from recipes.preparing import check_settings
from tests.recipes.tiny import tiny_llama, tiny_spec

CONFIGS = sorted((Path(recipes.__file__).parent / "configs").glob("*.toml"))


def _settings(name: str):
    path = next(p for p in CONFIGS if p.stem == name)
    return spec_from_mapping(read_mapping(str(path)))


def test_every_shipped_configuration_is_a_valid_spec() -> None:
    assert len(CONFIGS) >= 2
    for path in CONFIGS:
        assert spec_from_mapping(read_mapping(str(path))).data is not None


def test_the_seeds_pipeline_is_warned_about_with_reasons() -> None:
    findings = check_settings(_settings("chameleon-7b-spanish-seed"), step_s=10.0)
    subjects = {f.subject for f in findings if f.severity == "warning"}
    assert subjects >= {
        "lora.target_modules", "gradient_checkpointing", "data.padding", "evaluation.sample",
        "evaluation.choose", "schedule.evaluate_every_steps", "schedule.save_every_steps",
        "precision",
    }  # fmt: skip
    assert not [f for f in check_settings(_settings("chameleon-7b-spanish"), step_s=1.0)
                if f.severity == "warning"]  # fmt: skip


def test_the_seeds_checkpoints_drag_the_head_along() -> None:
    # 65,536 x 4,096 fp32 head beside 557,056 trained parameters with Adam's two moments.
    spec = _settings("chameleon-7b-spanish-seed")
    assert checkpoint_bytes(spec) == 65_536 * 4_096 * 4 + 557_056 * 12
    text = next(str(f) for f in check_schedule(spec, 10_000, None) if "checkpoints" in f.text)
    assert "100 checkpoints" in text
    assert checkpoint_bytes(spec.model_copy(update={"stack": "lean"})) == 557_056 * 12


def test_evaluations_are_counted_in_hours() -> None:
    spec = _settings("chameleon-7b-spanish-seed")
    finding = next(f for f in check_schedule(spec, 10_000, None, 5196.0) if "evaluations" in f.text)
    assert finding.severity == "warning"
    assert "1000 evaluations" in finding.text
    assert "60.1 days" in finding.text


def test_bf16_on_a_card_without_it() -> None:
    spec = tiny_spec(precision="bf16", weights_dtype="bfloat16")
    assert check_precision(spec, (7, 5))[0].subject == "precision"
    assert check_precision(spec, (8, 6)) == []


def test_reached_layers_are_told() -> None:
    spec = tiny_spec(lora={"rank": 4, "target_modules": ["lm_head"]})
    built = build(spec, config=tiny_llama(), device="cpu")
    found = check_model(built.model, reached_layers(built), len(decoder_layers(built.base)))
    assert "0 of 2 layers" in found[0].text
    built.model.requires_grad_(False)
    assert any(f.severity == "error" for f in check_model(built.model, 0, 2))


def test_expectation_is_the_planners_answer() -> None:
    from planner.estimate import estimate

    spec = spec_from_mapping({"model": "chameleon-7b", "device": "h200"})
    found = expectation(spec)
    assert found is not None
    assert found["peak_allocated_bytes"] == estimate(spec).peak_allocated_bytes
    assert expectation(spec_from_mapping({"model": "no/such", "device": "h200"})) is None


def test_check_prints_findings_and_builds_nothing(tmp_path, capsys, monkeypatch) -> None:
    train, test = write_demo_data(tmp_path, 8, 4, 0)
    tokenizer = demo_tokenizer()
    tokenizer.save_pretrained(tmp_path / "model")
    from recipes.demo_data import demo_config

    demo_config(tokenizer).save_pretrained(tmp_path / "model")
    spec = demo_spec(train, test, tmp_path / "model", 4)
    path = tmp_path / "spec.json"
    path.write_text(spec.model_dump_json(exclude_none=True), encoding="utf-8")
    assert run([str(path), "--check", "--device", "cpu"]) == 0
    assert "padding" in capsys.readouterr().out
    broken = json.loads(path.read_text())
    broken["sequence_length"] = 20  # shorter than an image and its question
    path.write_text(json.dumps(broken), encoding="utf-8")
    assert run([str(path), "--check", "--device", "cpu"]) == 2
    assert "nothing to learn" in capsys.readouterr().out


def test_report_sets_planned_beside_measured() -> None:
    summary = {"right": 3, "questions": 4, "accuracy": 0.75, "low": 0.3, "high": 0.95,
               "invalid": 0, "p_above_chance": 0.05}  # fmt: skip
    text = report_text(
        {
            "steps": 2, "seconds": 2.0, "output": "runs/x", "losses": [2.0, 1.0],
            "planned": {"step_seconds": 0.5, "peak_allocated_bytes": 2 << 30},
            "step_seconds": 1.0, "peak_allocated_bytes": 3 << 30, "base": summary,
            "tuned": summary, "p_value": 1.0,
        }
    )  # fmt: skip
    assert "2.00 GiB" in text
    assert "3.00 GiB" in text
    assert text.count("3 of 4 right") == 2


@pytest.mark.slow
def test_benchmark_runs_its_machinery(tmp_path) -> None:
    from recipes.benchmark import main, table

    out = tmp_path / "rows.json"
    assert main(["--tiny", "--quick", "--out", str(out)]) == 0
    rows = json.loads(out.read_text())
    assert [row["stack"] for row in rows] == ["stock", "lean"]
    assert all(row["step_s"] > 0 for row in rows)
    assert rows[0]["first_losses"][0] == pytest.approx(rows[1]["first_losses"][0], rel=0.05)
    assert "| lean |" in table(rows)
