"""The command, the picture and the snapshot, the last opened by torch's own tools."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
from torch.cuda import _memory_viz

from planner.errors import InputError
from probes.dry.cli import run_dry
from probes.dry.picture import save_timeline, series
from probes.dry.snapshot import save_snapshot
from probes.dry.trace import trace
from tests.probes.dry.conftest import make_spec

KEYS = {
    "resident_bytes", "peak_allocated_bytes", "peak_instant", "allocator_required_bytes",
    "reserved_bytes", "load_peak_bytes", "eval_peak_bytes", "live", "unknown_operations", "seconds",
}  # fmt: skip


def test_the_command_answers_in_json(llama: Any, tmp_path: Path, capsys: Any) -> None:
    llama.to_json_file(tmp_path / "config.json")
    timeline = tmp_path / "step.html"
    spec = tmp_path / "run.toml"
    spec.write_text(f'model = "{tmp_path}"\nsequence_length = 128\n')
    assert run_dry([str(spec), "--json", f"--timeline={timeline}"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer.keys() >= KEYS
    assert answer["peak_allocated_bytes"] <= answer["allocator_required_bytes"]
    assert answer["allocator_required_bytes"] <= answer["reserved_bytes"]
    assert sum(row["bytes"] for row in answer["live"]) == answer["peak_live_bytes"]
    assert "<svg" in timeline.read_text()


def test_bad_outputs_are_refused_before_the_trace(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="unknown ending"):
        run_dry(["chameleon-7b", "--timeline", str(tmp_path / "step.gif")])


def test_the_picture_keeps_the_peak(llama: Any, tmp_path: Path) -> None:
    traced = trace(make_spec(), config=llama)
    _, stacks, _ = series(traced)
    totals = [sum(values) for values in zip(*stacks.values(), strict=True)]
    assert max(totals) == traced.peak_live_bytes
    save_timeline(traced, tmp_path / "step.png")
    assert (tmp_path / "step.png").read_bytes().startswith(b"\x89PNG")


def test_torch_opens_the_snapshot(llama: Any, tmp_path: Path) -> None:
    traced = trace(make_spec(), config=llama)
    save_snapshot(traced, tmp_path / "step.pickle")
    data = pickle.loads((tmp_path / "step.pickle").read_bytes())
    assert _memory_viz.segsum(data)
    assert f"{len(data['device_traces'][0])} entries" in _memory_viz.trace(data)
    assert "html" in _memory_viz.trace_plot(data)
    held = sum(segment["allocated_size"] for segment in data["segments"])
    assert held == traced.replayed.allocated_bytes
    reserved = sum(segment["total_size"] for segment in data["segments"])
    assert reserved == traced.replayed.reserved_bytes
