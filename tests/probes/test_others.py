"""Asking other tools, with tools of our own making."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from planner.meters import read_meters
from planner.residuals import read_measured
from planner.spec import RunSpec
from probes.others.__main__ import ask_all, offline
from probes.others.tools import Answers, NotOffered, Tool, canifinetune, hf_mem

RECORDS = Path(__file__).parents[2] / "results" / "records"
MEASURED = next(iter(read_measured([RECORDS])))
METERS = read_meters([RECORDS])


def _tool(ask: object) -> Tool:
    return Tool("pytest", ("allocated", "device"), ask)  # type: ignore[arg-type]


def test_an_answer_is_held_against_the_record() -> None:
    def ask(spec: RunSpec) -> Answers:
        return {"allocated": MEASURED.peak_allocated_bytes}

    allocated, device = ask_all([MEASURED], METERS, [_tool(ask)])
    assert (allocated.status, allocated.error) == ("answered", 0)
    assert (device.status, device.estimate_bytes) == ("not offered", None)


def test_what_a_tool_raises_is_its_refusal() -> None:
    def ask(spec: RunSpec) -> Answers:
        raise ValueError("no vision\ntowers here [type=literal, input=1]")

    rows = list(ask_all([MEASURED], METERS, [_tool(ask)]))
    assert {(row.status, row.words) for row in rows} == {
        ("refused", "ValueError: no vision towers here")
    }


def test_long_words_end_with_a_sentence() -> None:
    def ask(spec: RunSpec) -> Answers:
        raise ValueError("No towers. " + "Why not: " + "x" * 500)

    row, _ = ask_all([MEASURED], METERS, [_tool(ask)])
    assert row.words == "ValueError: No towers"


def test_what_a_tool_lacks_is_told_apart() -> None:
    def ask(spec: RunSpec) -> Answers:
        raise NotOffered("no adapters")

    assert {row.status for row in ask_all([MEASURED], METERS, [_tool(ask)])} == {"not offered"}


def test_a_missing_package_is_no_refusal() -> None:
    def ask(spec: RunSpec) -> Answers:
        raise ModuleNotFoundError("nothing said about the run")

    with pytest.raises(ModuleNotFoundError):
        list(ask_all([MEASURED], METERS, [_tool(ask)]))


def test_a_tool_that_is_not_installed_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    tool = Tool("no-such-distribution-of-ours", ("device",), canifinetune)
    assert list(ask_all([MEASURED], METERS, [tool])) == []
    assert "is not installed" in capsys.readouterr().err


def test_quantised_rows_are_not_asked_of_a_reader_of_checkpoints() -> None:
    with pytest.raises(NotOffered):
        hf_mem(RunSpec(model="facebook/chameleon-7b", quantization="nf4"))


def test_the_cache_holds_the_catalogues_configs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HF_HUB_CACHE", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.setenv(name, "")  # restored afterwards
    offline(tmp_path, ["facebook/chameleon-7b"])
    folder = tmp_path / "models--facebook--chameleon-7b"
    revision = (folder / "refs" / "main").read_text()
    config = json.loads((folder / "snapshots" / revision / "config.json").read_text())
    assert config["hidden_size"] == 4096
    assert os.environ["HF_HUB_OFFLINE"] == "1"
