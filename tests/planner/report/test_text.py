"""The answer as text: the verdict first, sums that are the answer's own, the same bytes always."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

from planner.answer import Estimate
from planner.cli import main
from planner.estimate import estimate
from planner.levers import cheapest
from planner.report.groups import REST, groups
from planner.report.text import fit_lines, verdict_sentence
from planner.units import GIB
from tests.planner.tiny import tiny_spec


@pytest.fixture(scope="module")
def answer(tiny: str) -> Estimate:
    return estimate(tiny_spec(tiny, sequence_length=1024, micro_batch_size=4))


@pytest.mark.parametrize(("memory", "start", "code"), [
    ("24GiB", "Yes, it fits: needs about ", 0),
    ("100MiB", "No, it does not fit: needs about ", 1),
])  # fmt: skip
def test_first_line_is_the_verdict(
    tiny: str, memory: str, start: str, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["fit", tiny, "--gpu", "rtx-3090", "--memory", memory]) == code
    assert capsys.readouterr().out.startswith(start)


def test_tight_says_that_it_may_run_out(tiny: str) -> None:
    needs = estimate(tiny_spec(tiny)).device_required_bytes
    tight = estimate(tiny_spec(tiny, device_memory=needs))
    assert tight.verdict == "tight"
    assert verdict_sentence(tight).startswith("Tight: needs about ")
    assert "may run out" in verdict_sentence(tight)


def test_groups_sum_to_the_peak_and_are_few(answer: Estimate) -> None:
    found = groups(answer.terms)
    assert 5 <= len(found) <= 10
    assert sum(group.bytes for group in found) == answer.peak_allocated_bytes
    assert sum(len(group.terms) for group in found) == len(answer.terms)
    named = [group.bytes for group in found if group.name != REST]
    assert named == sorted(named, reverse=True)


def test_rows_add_up_to_what_is_needed(answer: Estimate) -> None:
    text = "\n".join(line.text for line in fit_lines(answer))
    block = text.partition("What fills the memory")[2].partition("needed in all")
    sizes = [float(size) for size in re.findall(r"(-?\d+\.\d\d) GiB", block[0])]
    total = float(re.findall(r"(\d+\.\d\d) GiB", block[2])[0])
    assert len(sizes) >= 7
    assert sum(sizes) == pytest.approx(total, abs=0.005 * (len(sizes) + 1))
    assert total == pytest.approx(answer.device_required_bytes / GIB, abs=0.005)


def test_lines_name_settings_time_and_levers(answer: Estimate) -> None:
    text = "\n".join(line.text for line in fit_lines(answer, cheapest(answer)))
    assert "4 x 1024 tokens" in text
    assert "LoRA r=16 on all-linear" in text
    assert "tokens/s" in text
    assert "--gradient-checkpointing true" in text
    assert f"{answer.parameters.trainable:,} trained" in text


def _piped(tiny: str, **environment: str) -> bytes:
    command = [sys.executable, "-m", "planner", "fit", tiny, "--gpu", "rtx-3090"]
    return subprocess.run(command, capture_output=True, check=True,
                          env={**os.environ, **environment}).stdout  # fmt: skip


def test_piped_bytes_are_the_same_whatever_the_environment(tiny: str) -> None:
    plain = _piped(tiny, PYTHONIOENCODING="utf-8", PYTHONHASHSEED="1")
    coloured = _piped(tiny, PYTHONIOENCODING="utf-8", PYTHONHASHSEED="2", COLUMNS="40",
                      FORCE_COLOR="1", TERM="xterm-256color")  # fmt: skip
    assert plain == coloured
    assert b"\x1b" not in plain
    assert "█".encode() in plain


def test_an_encoding_without_blocks_gets_hashes(tiny: str) -> None:
    text = _piped(tiny, PYTHONIOENCODING="ascii").decode("ascii")
    assert "###" in text


def test_run_cost_is_told_with_a_schedule(tiny: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["fit", tiny, "--gpu", "rtx-3090", "--schedule-samples", "1000",
                 "--schedule-epochs", "3", "--gradient-accumulation-steps", "4",
                 "--price-per-hour", "0.5"]  # fmt: skip
    assert main(arguments) == 0
    text = capsys.readouterr().out
    assert "750 steps take" in text  # 1,000 batches of one, groups of four, three epochs
    assert "costs" in text
