"""Flags and files make the same run spec."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from planner.arguments import field_types, parse_arguments
from planner.cli import main
from planner.spec import RunSpec, spec_from_mapping


def _spec(*arguments: str) -> RunSpec:
    return parse_arguments("fit", arguments).run_spec()


@pytest.mark.parametrize(("arguments", "fields"), [
    (("--gpu", "rtx-3090", "--memory", "23.2GiB"),
     {"device": "rtx-3090", "device_memory": 24_910_810_316}),
    (("--lora-rank", "8", "--lora-target-modules", "q_proj,v_proj"),
     {"lora": {"rank": 8, "target_modules": ["q_proj", "v_proj"]}}),
    (("--rank=8", "--lora.alpha=16"), {"lora": {"rank": 8, "alpha": 16.0}}),
    (("--gradient-checkpointing",), {"gradient_checkpointing": True}),
    (("--gradient_checkpointing=true",), {"gradient_checkpointing": True}),
    (("--no-double-quant",), {"double_quant": False}),
    (("--double-quant", "false", "--micro_batch_size", "4"),
     {"double_quant": False, "micro_batch_size": 4}),
    (("--schedule-samples", "100", "--schedule-epochs", "1.5"),
     {"schedule": {"samples": 100, "epochs": 1.5}}),
    (("--versions-torch", "2.12.0"), {"versions": {"torch": "2.12.0"}}),
])  # fmt: skip
def test_flags_are_fields(arguments: tuple[str, ...], fields: dict[str, object]) -> None:
    assert _spec("m", *arguments) == spec_from_mapping({"model": "m", **fields})


def test_switch_before_the_model_does_not_swallow_it() -> None:
    spec = _spec("--gradient-checkpointing", "m", "--gpu", "rtx-3090")
    assert (spec.model, spec.gradient_checkpointing) == ("m", True)


def test_flags_win_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "spec.toml"
    file.write_text('model = "m"\nmicro_batch_size = 4\n[lora]\nrank = 8\nalpha = 3.0\n')
    spec = _spec("--spec", str(file), "--lora-rank", "32")
    assert (spec.micro_batch_size, spec.lora.rank, spec.lora.alpha) == (4, 32, 3.0)


def test_toml_json_and_flags_agree(tmp_path: Path) -> None:
    values = {"model": "m", "device": "rtx-3090", "sequence_length": 64, "lora": {"rank": 4}}
    as_json, as_toml = tmp_path / "s.json", tmp_path / "s.toml"
    as_json.write_text(json.dumps(values))
    as_toml.write_text('model = "m"\ndevice = "rtx-3090"\nsequence_length = 64\n[lora]\nrank = 4\n')
    flags = _spec("m", "--gpu", "rtx-3090", "--sequence-length", "64", "--lora-rank", "4")
    assert _spec("--spec", str(as_json)) == _spec("--spec", str(as_toml)) == flags


def test_help_names_every_field_of_the_run_spec(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "--help"]) == 0
    text = capsys.readouterr().out
    assert len(field_types()) > 30
    for path in field_types():
        if path != ("model",):
            assert "--" + "-".join(path).replace("_", "-") in text
