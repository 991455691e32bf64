"""`fit --exact` and what it says where torch is missing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from planner.cli import main
from planner.estimate import estimate
from tests.planner.tiny import tiny_spec

_WITHOUT = """
import sys
for name in sys.argv.pop(1).split(","):
    sys.modules[name] = None
from planner.cli import main
sys.exit(main(sys.argv[1:]))
"""


def _without(missing: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", _WITHOUT, missing, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_exact_answer_has_the_traced_bytes_and_the_modelled_time(
    tiny: str, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("torch")
    from planner.devices import find_device
    from probes.dry.exact import answer as answer_of
    from probes.dry.target import Target
    from probes.dry.trace import trace

    spec = tiny_spec(tiny, sequence_length=512, micro_batch_size=4)
    arguments = ["fit", tiny, "--gpu", "rtx-3090", "--sequence-length", "512",
                 "--micro-batch-size", "4", "--exact", "--json"]  # fmt: skip
    assert main(arguments) == 0
    answer = json.loads(capsys.readouterr().out)
    card = find_device("rtx-3090")
    traced = answer_of(trace(spec, target=Target(*card.compute_capability, card.sm_count)))
    modelled = estimate(spec)
    assert answer["basis"] == "traced"
    for name in ("resident_bytes", "peak_allocated_bytes", "allocator_required_bytes"):
        assert answer[name] == traced[name]
        assert answer[name] == pytest.approx(getattr(modelled, name), rel=0.03)
    assert sum(term["bytes"] for term in answer["terms"]) == answer["peak_allocated_bytes"]
    assert answer["step_seconds"] == modelled.step_seconds
    assert answer["device_required_bytes"] == (
        answer["allocator_required_bytes"] + answer["non_torch_bytes"]
    )


def test_exact_without_torch_names_the_extra(tiny: str) -> None:
    result = _without("torch", "fit", tiny, "--gpu", "rtx-3090", "--exact")
    assert result.returncode == 2
    assert "vramwise[train]" in result.stderr
    assert "torch" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("verb", ["probe", "train"])
def test_verbs_of_an_extra_name_it(verb: str) -> None:
    missing = "torch,transformers,peft,psutil,accelerate,bitsandbytes,datasets,pynvml"
    result = _without(missing, verb, "--dry" if verb == "probe" else "x")
    assert result.returncode == 2
    assert "Traceback" not in result.stderr


def test_parquet_without_pyarrow_names_the_extra_before_it_starts(
    tiny: str, tmp_path: Path
) -> None:
    grid = tmp_path / "grid.toml"
    grid.write_text(f'model = "{tiny}"\ndevice = "rtx-3090"\n[grid]\nmicro_batch_size = [1]\n')
    result = _without("pyarrow", "sweep", str(grid), "--out", str(tmp_path / "out.parquet"))
    assert result.returncode == 2
    assert "vramwise[train]" in result.stderr
    assert not list(tmp_path.glob("out*"))
