"""Host memory: what a process measured, what stays there, and its part in the verdict."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import planner.estimate
import planner.host
from planner.answer import Estimate
from planner.cli import main
from planner.devices import find_device
from planner.estimate import estimate
from planner.levers import cheapest
from planner.report.text import verdict_sentence
from planner.spec import RunSpec
from planner.sweep import evaluate
from planner.units import GIB
from tests.planner.tiny import tiny_spec

RECORDS = Path(__file__).parents[2] / "results" / "records"


def _answer(tiny: str, **fields: object) -> Estimate:
    return estimate(tiny_spec(tiny, **{"device": "rtx-3090", **fields}))


def test_the_process_is_what_fresh_processes_measured() -> None:
    lines = [line for file in RECORDS.rglob("*.jsonl") for line in file.open(encoding="utf-8")]
    found = []
    for record in map(json.loads, lines):
        peak = (record.get("meters") or {}).get("host_peak_rss_bytes")
        if peak and (record.get("process") or {}).get("position") == 0:
            found.append(peak)
    data = planner.host._process()
    assert len(found) >= data["records"] >= 40
    assert data["low_bytes"] >= min(found)
    assert data["high_bytes"] <= max(found)


def test_terms_of_the_whole_run_and_of_one_moment_sum_to_the_requirement(tiny: str) -> None:
    answer = _answer(tiny, optimizer="grokadamw", micro_batch_size=4)
    kept = ("the whole run", "when the card is full")
    throughout = sum(t.bytes for t in answer.host_terms if t.instant in kept)
    moments = [t.bytes for t in answer.host_terms if t.instant not in kept]
    assert len(moments) >= 2
    assert answer.host_bytes == throughout + max(moments)
    assert all(term.formula and term.source for term in answer.host_terms)


def test_states_in_host_memory_are_counted_there_and_not_on_the_card(tiny: str) -> None:
    plain, grok = (
        _answer(tiny, optimizer=name, method="full", quantization="none")
        for name in ("sgd", "grokadamw")
    )
    states = 3 * 2 * plain.parameters.total
    assert grok.host_bytes - plain.host_bytes == pytest.approx(states, rel=0.01)
    assert grok.host_low_bytes - plain.host_low_bytes == pytest.approx(states, rel=0.01)
    assert not any(term.category == "optimizer_states" for term in grok.terms)


def test_a_full_fine_tune_writes_its_model_through_host_memory() -> None:
    spec = RunSpec(model="Qwen/Qwen2.5-7B", device="h200", method="full", quantization="none")
    written = next(t for t in estimate(spec).host_terms if t.instant == "saving")
    assert written.bytes == 2 * estimate(spec).parameters.total
    lora = spec.model_copy(update={"method": "lora"})
    adapters = next(t for t in estimate(lora).host_terms if t.instant == "saving")
    assert adapters.bytes == 4 * estimate(lora).parameters.trainable


def test_unknown_host_memory_is_told_and_not_judged(tiny: str, capsys) -> None:  # type: ignore[no-untyped-def]
    answer = _answer(tiny)
    assert (answer.host_total_bytes, answer.host_verdict) == (None, None)
    assert answer.verdict == answer.device_verdict
    assert main(["fit", tiny, "--gpu", "rtx-3090"]) == 0
    assert "--host-memory has it judged" in capsys.readouterr().out


@pytest.mark.parametrize(("host", "verdict", "code", "words"), [
    ("64GiB", "fits", 0, "Yes, it fits"),
    ("2GiB", "tight", 0, "has room, but the machine's own memory may run out"),
    ("1GiB", "does_not_fit", 1, "has room, but the machine's own memory does not"),
])  # fmt: skip
def test_host_memory_that_is_given_is_part_of_the_verdict(
    tiny: str, host: str, verdict: str, code: int, words: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    arguments = ["fit", tiny, "--gpu", "rtx-3090", "--host-memory", host]
    assert main([*arguments, "--json"]) == code
    answer = json.loads(capsys.readouterr().out)
    assert answer["verdict"] == answer["host_verdict"] == verdict
    assert answer["device_verdict"] == "fits"
    assert main(arguments) == code
    assert words in capsys.readouterr().out.splitlines()[0]


def test_the_verdict_is_the_worse_of_card_and_host(tiny: str) -> None:
    answer = _answer(tiny, device_memory="0.2GiB", host_memory="64GiB")
    assert (answer.device_verdict, answer.host_verdict) == ("does_not_fit", "fits")
    assert answer.verdict == "does_not_fit"
    assert "machine's own" not in verdict_sentence(answer)


def test_levers_are_those_that_turn_the_host_verdict() -> None:
    fields = {"method": "full", "quantization": "none", "optimizer": "adamw_8bit"}
    spec = RunSpec.model_validate(
        {"model": "Qwen/Qwen2.5-7B", "device": "h200", "host_memory": 8 * GIB, **fields}
    )
    answer = estimate(spec)
    assert (answer.device_verdict, answer.verdict) == ("fits", "does_not_fit")
    shown = cheapest(answer)
    assert [lever.flags for lever in shown] == ["--method lora"]
    assert shown[0].verdict == "fits"


def test_a_sweep_row_has_the_host_in_its_verdict(tiny: str) -> None:
    specs = [tiny_spec(tiny, device="rtx-3090", host_memory=size) for size in ("64GiB", "1GiB")]
    assert [row.verdict for row in evaluate(specs)] == [estimate(s).verdict for s in specs]


def test_the_local_machine_is_judged_for_the_local_card_alone(
    tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:        1048576 kB\nMemFree:  1 kB\n", encoding="ascii")
    monkeypatch.setattr(planner.host, "_MEMINFO", meminfo)
    assert _answer(tiny).host_total_bytes is None
    local = find_device("rtx-3090")._replace(total_source="NVML")
    monkeypatch.setattr(planner.estimate, "local_device", lambda: local)
    answer = estimate(tiny_spec(tiny).model_copy(update={"device": None}))
    assert answer.host_total_bytes == 1 << 30
    assert answer.verdict == "does_not_fit"
    meminfo.unlink()
    assert estimate(tiny_spec(tiny).model_copy(update={"device": None})).host_verdict is None
