"""The import budget: an answer loads no torch, transformers or pandas, nor numpy for fit."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = ("torch", "transformers", "pandas", "peft", "bitsandbytes", "datasets", "accelerate")
_CODE = """
import sys
from planner.cli import main
code = main(sys.argv[1:])
print("loaded:", ",".join(name for name in sys.modules if "." not in name), file=sys.stderr)
sys.exit(code)
"""


def _loaded(*arguments: str) -> set[str]:
    command = [sys.executable, "-c", _CODE, *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return set(result.stderr.rpartition("loaded:")[2].strip().split(","))


@pytest.mark.parametrize("arguments", [
    ("fit", "{model}", "--gpu", "rtx-3090", "--json"),
    ("fit", "{model}", "--gpu", "rtx-3090"),
    ("gpus", "{model}"),
    ("explain", "{model}", "--gpu", "rtx-3090"),
    ("models",),
    ("ladder", "lavin-7b"),
    ("seeds", "--json"),
    ("table", "{model}", "--gpus", "rtx-3090"),
    ("--help",),
])  # fmt: skip
def test_answer_loads_nothing_heavy(arguments: tuple[str, ...], tiny: str) -> None:
    loaded = _loaded(*(part.format(model=tiny) for part in arguments))
    assert "planner" in loaded
    assert not loaded & set(HEAVY)


def test_fit_into_a_pipe_loads_neither_numpy_nor_rich(tiny: str) -> None:
    loaded = _loaded("fit", tiny, "--gpu", "rtx-3090")
    assert not loaded & {"numpy", "rich"}


def test_sweep_loads_nothing_heavy(tiny: str, tmp_path: Path) -> None:
    grid = tmp_path / "grid.toml"
    grid.write_text(f'model = "{tiny}"\ndevice = "rtx-3090"\n[grid]\nmicro_batch_size = [1, 2]\n')
    loaded = _loaded("sweep", str(grid), "--out", str(tmp_path / "out.csv"))
    assert not loaded & set(HEAVY)


def test_planner_source_names_no_heavy_package() -> None:
    import planner

    folder = Path(planner.__file__).parent
    files = list(folder.rglob("*.py"))
    assert len(files) > 30
    for file in files:
        text = file.read_text(encoding="utf-8")
        for name in HEAVY:
            assert f"import {name}" not in text, file
            assert f"from {name}" not in text, file
