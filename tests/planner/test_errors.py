"""Bad input: exit 2, a line for each problem that names its field and value, no traceback."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from planner.cli import main

LLAMA = ("fit", "llama-7b", "--gpu", "rtx-3090")
CHAMELEON = ("fit", "chameleon-7b", "--gpu", "rtx-3090")

FLAGS: list[tuple[tuple[str, ...], tuple[str, ...]]] = [
    ((*LLAMA, "--micro-batch-size", "0"), ("micro_batch_size", "0")),
    ((*LLAMA, "--micro-batch-size", "-3"), ("micro_batch_size", "-3")),
    ((*LLAMA, "--micro-batch-size", "1000000000000"), ("micro_batch_size", "1000000000000")),
    ((*LLAMA, "--micro-batch-size", "two"), ("micro_batch_size", "'two'")),
    ((*LLAMA, "--micro-batch-size"), ("--micro-batch-size", "needs a value")),
    ((*LLAMA, "--sequence-length", "1000000000"), ("sequence_length", "1000000000")),
    ((*LLAMA, "--sequence-length", "1e3"), ("sequence_length", "'1e3'")),
    ((*LLAMA, "--micro-batch-size", "16777216", "--sequence-length", "16777216"),
     ("micro_batch_size", "16777216", "tokens")),
    ((*LLAMA, "--lora-rank", "0"), ("lora.rank", "0")),
    ((*LLAMA, "--lora-alpha", "inf"), ("lora.alpha", "inf")),
    ((*LLAMA, "--lora-alpha", "nan"), ("lora.alpha", "nan")),
    ((*LLAMA, "--lora-dropout", "1"), ("lora.dropout", "1.0")),
    ((*LLAMA, "--max-grad-norm", "inf"), ("max_grad_norm", "inf")),
    ((*LLAMA, "--memory", "0"), ("device_memory", "0")),
    ((*LLAMA, "--memory", "24"), ("device_memory", "24")),
    ((*LLAMA, "--memory", "23.2"), ("device_memory", "'23.2'")),
    ((*LLAMA, "--memory", "-5GiB"), ("device_memory", "'-5GiB'")),
    ((*LLAMA, "--memory", "5GX"), ("device_memory", "'5GX'", "GiB")),
    ((*LLAMA, "--memory", "1e400GiB"), ("device_memory", "'1e400GiB'")),
    ((*LLAMA, "--memory", "1e25GiB"), ("device_memory", "1125899906842624")),
    ((*LLAMA, "--optimizer", "adamw_torhc"), ("optimizer", "'adamw_torhc'", "'adamw_torch'")),
    ((*LLAMA, "--optimizer", "adamw_torch_xla"), ("optimizer", "'adamw_torch_xla'", "XLA devices")),
    ((*LLAMA, "--quantization", "nf5"), ("quantization", "'nf5'", "'nf4'")),
    ((*LLAMA, "--precision", "fp8"), ("precision", "'fp8'", "'bf16'")),
    ((*LLAMA, "--method", "full", "--quantization", "nf4"), ("method", "'full'", "nf4")),
    ((*LLAMA, "--lora-target-modules", "q_prj"), ("target_modules", "'q_prj'", "'q_proj'")),
    ((*LLAMA, "--lora-target-modules", ""), ("target_modules", "''")),
    ((*LLAMA, "--lora-target-modules", "q_proj,,v_proj"), ("target_modules", "q_proj,,v_proj")),
    ((*LLAMA, "--images-per-sample", "1"), ("images_per_sample", "take no images")),
    ((*CHAMELEON, "--images-per-sample", "1"), ("images_per_sample", "1026", "512")),
    ((*CHAMELEON, "--images-per-sample", "-1"), ("images_per_sample", "-1")),
    ((*LLAMA, "--gradient-checkpointing", "maybe"), ("gradient_checkpointing", "'maybe'")),
    ((*LLAMA, "--gradient-checkpoint"), ("--gradient-checkpoint", "'--gradient-checkpointing'")),
    ((*LLAMA, "extra"), ("'extra'",)),
    ((*LLAMA, "--max", "foo"), ("--max", "'foo'", "micro_batch_size")),
    ((*LLAMA, "--price-per-hour", "-1"), ("--price-per-hour", "'-1'")),
    ((*LLAMA, "--schedule-epochs", "1e99"), ("schedule.epochs", "1e+99")),
    (("fit",), ("model", "required")),
    (("fit", ""), ("model", "''")),
    (("fit", "llama-7c", "--gpu", "rtx-3090"), ("model", "'llama-7c'", "'llama-7b'")),
    (("fit", "a" * 5000, "--gpu", "rtx-3090"), ("model", "is not known")),
    (("fit", "llama-7b", "--gpu", "rtx-3091"), ("device", "'rtx-3091'", "'rtx-3090'")),
    (("fti",), ("'fti'", "'fit'")),
    (("gpus", "llama-7b", "--prices", "/nonexistent.toml"), ("prices", "/nonexistent.toml")),
    (("sweep",), ("GRID.toml", "--out")),
    (("table", "llama-7b", "--gpus", "foo"), ("device", "'foo'")),
    (("table", "llama-7b", "--gpu", "rtx-3090", "--batch-sizes", "0,1"), ("'0,1'",)),
    (("table", "llama-7b", "--format", "pdf"), ("--format", "'pdf'", "tex")),
    (("explain", "llama-7b", "--gpu", "rtx-3090", "--bytes", "lots"), ("--bytes", "'lots'")),
]  # fmt: skip

FILES: list[tuple[str, bytes, tuple[str, ...]]] = [
    ("empty.toml", b"", ("is empty",)),
    ("blank.json", b" \n\t", ("is empty",)),
    ("broken.toml", b"model = [", ("neither TOML nor JSON",)),
    ("broken.json", b'{"model": ', ("neither TOML nor JSON", "line 1")),
    ("latin1.toml", b'model = "caf\xe9"', ("cannot be read", "utf-8")),
    ("null.toml", b'model = "a\x00b"', ("neither TOML nor JSON",)),
    ("deep.json", b'{"a":' * 100_000, ("nested too deeply",)),
    ("types.toml", b'model = 3\nmicro_batch_size = "two"\nlora = 5\n',
     ("model:", "(got 3)", "micro_batch_size:", "'two'", "lora:", "(got 5)")),
    ("nested.toml", b'model = "llama-7b"\n[lora]\nrnak = 3\n', ("lora.rnak", "'rank'")),
    ("fraction.json", b'{"model": "llama-7b", "micro_batch_size": 1.5, "quantization": "nf5"}',
     ("micro_batch_size", "1.5", "quantization", "'nf5'")),
    ("bool.json", b'{"model": "llama-7b", "micro_batch_size": true}', ("micro_batch_size", "True")),
]  # fmt: skip


def _error_lines(capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...]) -> list[str]:
    assert main(list(arguments)) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert lines
    assert all(line.startswith("error: ") for line in lines)
    assert "Traceback" not in captured.err
    return lines


@pytest.mark.parametrize(("arguments", "told"), FLAGS)
def test_flags_that_are_wrong(
    arguments: tuple[str, ...], told: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    text = "\n".join(_error_lines(capsys, arguments))
    assert all(part in text for part in told), text


@pytest.mark.parametrize(("name", "content", "told"), FILES)
def test_files_that_are_wrong(
    name: str, content: bytes, told: tuple[str, ...], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    path = tmp_path / name
    path.write_bytes(content)
    text = "\n".join(_error_lines(capsys, ("fit", "--spec", str(path), "--gpu", "rtx-3090")))
    assert all(part in text for part in told), text


@pytest.mark.parametrize(("content", "told"), [
    (b"", ("is empty",)),
    (b"{", ("is not JSON",)),
    (b"[]", ("is not a JSON object",)),
    (b"{}", ("model_type", "missing")),
    (b'{"model_type": "mixtral"}', ("mixtral",)),
    (b'{"model_type": "llama", "hidden_size": -1}', ("hidden_size", "-1", "num_hidden_layers")),
    (b"\xff\xfe\x00", ("cannot be read",)),
])  # fmt: skip
def test_configs_that_are_wrong(
    content: bytes, told: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_bytes(content)
    text = "\n".join(_error_lines(capsys, ("fit", str(tmp_path), "--gpu", "rtx-3090")))
    assert all(part in text for part in told), text


@pytest.mark.parametrize(("grid", "told"), [
    ("micro_batch_size = []", ("grid.micro_batch_size", "[]")),
    ("micro_batch_size = 3", ("grid.micro_batch_size", "3")),
    ('micro_batch_size = [1, 0]\noptimizer = ["adamw_torch", "adamw_9"]\nfoo = [1]',
     ("grid.micro_batch_size", "0", "grid.optimizer", "'adamw_9'", "grid.foo")),
    ('model = ["llama-7b", "llama-7c"]', ("grid.model", "'llama-7c'")),
    ('device = ["rtx-3091"]', ("device", "'rtx-3091'")),
])  # fmt: skip
def test_grids_that_are_wrong(
    grid: str, told: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = tmp_path / "grid.toml", tmp_path / "out.csv"
    path.write_text(f'model = "llama-7b"\ndevice = "rtx-3090"\n[grid]\n{grid}\n')
    text = "\n".join(_error_lines(capsys, ("sweep", str(path), "--out", str(out))))
    assert all(part in text for part in told), text
    assert not out.exists()


@pytest.mark.parametrize("out", ["table.xls", "nowhere/table.csv"])
def test_sweep_output_that_cannot_be(
    out: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "grid.toml"
    path.write_text('model = "llama-7b"\n[grid]\nmicro_batch_size = [1]\n')
    lines = _error_lines(capsys, ("sweep", str(path), "--out", str(tmp_path / out)))
    assert len(lines) == 1
    assert "--out" in lines[0]


def test_several_errors_at_once_are_all_told(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = (*LLAMA, "--foo", "3", "--micro-batch-size", "0", "--optimizer", "x",
                 "--lora-rank", "-1", "--memory", "x")  # fmt: skip
    lines = _error_lines(capsys, arguments)
    assert len(lines) == 5
    named = ("--foo", "device_memory", "lora.rank", "micro_batch_size", "optimizer")
    for name in named:
        assert (
            sum(line.startswith(f"error: {name}:") or f"{name} is" in line for line in lines) == 1
        )


def test_bad_input_of_the_installed_command_ends_with_2_and_no_traceback() -> None:
    command = [sys.executable, "-m", "planner", "fit", "llama-7b", "--gpu", "rtx-3090",
               "--micro-batch-size", "0"]  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.splitlines() == [
        "error: micro_batch_size: input should be greater than or equal to 1 (got 0)"
    ]


def test_wrong_names_of_every_kind_are_told_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["fit", "facebook/chamelon-7b", "--gpu", "rtx-3091", "--optimizer",
                 "adamw_torch_xla"])  # fmt: skip
    told = capsys.readouterr().err.splitlines()
    assert code == 2
    assert [line.split(":")[1].strip() for line in told] == ["model", "device", "optimizer"]
    code = main(["fit", "facebook/chameleon-7b", "--gpu", "rtx-3091", "--lora-target-modules",
                 "q_prj", "--images-per-sample", "9"])  # fmt: skip
    told = capsys.readouterr().err.splitlines()
    assert code == 2
    assert [line.split(":")[1].strip() for line in told] == [
        "device", "images_per_sample", "lora.target_modules",
    ]  # fmt: skip
