"""Lean against stock, side by side: `python -m recipes.benchmark [--out FILE] [--quick]`.

Each case runs in a fresh process; its row is printed as it comes, the table at the end. No torch
in this process. Needs a CUDA card that holds a 7B (`--tiny` runs the machinery on a CPU).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from planner.units import format_gib, format_seconds
from recipes.console import note, out

_LORA = {"rank": 16, "alpha": 32.0, "dropout": 0.05, "target_modules": "all-linear"}
_NF4 = {
    "model": "facebook/chameleon-7b", "quantization": "nf4", "double_quant": True, "lora": _LORA,
    "micro_batch_size": 8, "sequence_length": 1024, "gradient_checkpointing": True,
    "optimizer": "adamw_torch_fused", "precision": "bf16",
}  # fmt: skip
_BF16 = {**_NF4, "quantization": "none"}
_FAST = {**_BF16, "micro_batch_size": 4, "gradient_checkpointing": False}
_LARGE = {**_FAST, "micro_batch_size": 16}
_SEED = {
    **_NF4, "lora": {"rank": 8, "alpha": 32.0, "dropout": 0.05, "target_modules": ["lm_head"]},
    "micro_batch_size": 1, "sequence_length": 512, "gradient_accumulation_steps": 4,
    "precision": "fp16", "double_quant": False, "optimizer": "paged_adamw_8bit",
}  # fmt: skip
_PAIRS = {
    "NF4, LoRA r=16 on all linears, 8 x 1024, checkpointed": _NF4,
    "bf16, LoRA r=16 on all linears, 16 x 1024": _LARGE,
    "bf16, LoRA r=16 on all linears, 4 x 1024": _FAST,
    "the seed's: NF4, LoRA r=8 on lm_head, 1 x 512 x 4, fp16, checkpointed": _SEED,
    "bf16, LoRA r=16 on all linears, 8 x 1024, checkpointed": _BF16,
}
# Tokens of a question after the words that all share. The seed asked the first 100 rows of MMMLU,
# which are all abstract algebra: short ones.
_QUESTIONS = {
    "of one subject as the seed's (60 to 150 tokens)": (60, 150),
    "of all subjects (60 to 300 tokens)": (60, 300),
}

_AHEAD = 2  # processes that import while another case runs
_LEAST_S = 10.0


def cases(quick: bool) -> list[dict[str, Any]]:
    """The cases in the order that tells most first, should time run out."""
    listed: list[dict[str, Any]] = [{"name": "matrix rate"}, {"name": "kernel check"}]
    for index, (name, spec) in enumerate(_PAIRS.items()):
        if quick and index:
            break
        for stack in ("stock", "lean"):
            caps = 6 if index == 0 and not quick else 0
            listed.append({"name": name, "spec": {**spec, "stack": stack}, "caps": caps})
    spec = {**_SEED, "stack": "lean", "precision": "bf16"}
    evaluations = [
        {"name": f"evaluation of 100 questions, {name}", "tokens": tokens, "spec": spec}
        for name, tokens in _QUESTIONS.items()
    ]
    return listed if quick else [*listed[:4], *evaluations, *listed[4:], *_variants()]


def _variants() -> list[dict[str, Any]]:
    name, spec = next(iter(_PAIRS.items()))
    lean = {**spec, "stack": "lean"}
    options: dict[str, dict[str, Any]] = {
        "in two sub-batches": {"sub_batches": 2},
        "layers recomputed whole": {"split_layers": False},
        "torch's own dropout": {"kernels": False},
        "not compiled": {"compile": False},
    }
    profiled = {"name": f"{name}; profiled", "spec": lean, "profile": True}
    return [
        profiled,
        *(
            {"name": f"{name}; {label}", "spec": lean, "options": values}
            for label, values in options.items()
        ),
    ]


def main(argv: list[str] | None = None) -> int:
    """Run the cases; 0 when every one made a row."""
    parser = argparse.ArgumentParser(prog="python -m recipes.benchmark", description=__doc__)
    parser.add_argument("--out", type=Path, help="write every row here, as JSON")
    parser.add_argument("--quick", action="store_true", help="the first pair alone, no caps")
    parser.add_argument("--tiny", action="store_true", help="tiny model on the CPU: a smoke test")
    parser.add_argument("--only", default="", help="cases whose name and stack hold this text")
    parser.add_argument("--seconds", type=float, default=460, help="start no case after this")
    arguments = parser.parse_args(argv)
    began, rows, failed = time.monotonic(), [], 0
    chosen = [case for case in cases(arguments.quick) if arguments.only in _label(case)]
    if arguments.tiny:
        chosen = [_tiny(case) for case in chosen if "spec" in case]
    waiting = [_start(case) for case in chosen[:_AHEAD]]
    kernels = True
    for place, case in enumerate(chosen):
        if place + _AHEAD < len(chosen):
            waiting.append(_start(chosen[place + _AHEAD]))
        if not kernels and case.get("spec", {}).get("stack") == "lean":
            case = {**case, "options": {**case.get("options", {}), "kernels": False}}
        row = _run(waiting.pop(0), case, arguments.seconds - (time.monotonic() - began))
        failed += "error" in row
        if row["name"] == "kernel check":
            kernels = float(row.get("kernel_error", 1)) < 0.02  # bf16 rounds at 0.004
        rows.append(row)
        out(f"[{time.monotonic() - began:.0f} s] {_line(row)}")
        if arguments.out:
            _write(arguments.out, rows)
    out("\n" + table(rows))
    return 1 if failed else 0


def _start(case: dict[str, Any]) -> subprocess.Popen[str]:
    """A fresh process for a case, which imports while the cases before it run and then waits for
    its case on standard input: until then it allocates nothing through torch."""
    environment = {"OMP_NUM_THREADS": "4", **os.environ}  # those that wait leave the host alone
    if case.get("spec", {}).get("stack") == "lean":
        environment["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
    return subprocess.Popen(
        [sys.executable, "-m", "recipes.benchmark_case"], stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
    )  # fmt: skip


def _run(child: subprocess.Popen[str], case: dict[str, Any], limit_s: float) -> dict[str, Any]:
    """The case's row, or a row that says why there is none."""
    if limit_s < _LEAST_S:
        child.kill()
        return {"name": _label(case), "error": "no time left"}
    try:
        answer, words = child.communicate(json.dumps(case), timeout=limit_s)
    except subprocess.TimeoutExpired:
        child.kill()
        return {"name": _label(case), "error": f"stopped after {limit_s:.0f} s"}
    if case.get("profile"):
        note(words)
    lines = answer.strip().splitlines()
    if child.returncode or not lines:
        return {"name": _label(case), "error": words.strip()[-1500:]}
    return {"command": "python -m recipes.benchmark", **json.loads(lines[-1])}


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown; ratios are of lean to the stock row of its pair."""
    rate = next((row["flops_per_s"] for row in rows if "flops_per_s" in row), None)
    lines = [
        "| case | stack | step | tokens/s | x stock | allocated / reserved | cap passed (failed) "
        "| x stock | useful TFLOP/s | of the matrix rate | floor |",
        "|" + " --- |" * 11,
    ]
    stock = {row["name"]: row for row in rows if row.get("stack") == "stock" and "step_s" in row}
    for row in rows:
        if row.get("outcome"):
            lines.append(f"| {row['name']} | {row['stack']} | {row['outcome']} |" + " - |" * 8)
        if "step_s" in row:  # a variant's name is its pair's, then what it does otherwise
            pair = row["name"].partition(";")[0]
            lines.append(_table_line(row, stock.get(pair, {}), rate))
    lines += [f"\n{_line(row)}" for row in rows if "options_s" in row]
    if rate:
        lines.append(f"\nMatrix rate (bf16, 8192 cubed, random data): {rate / 1e12:.0f} TFLOP/s.")
    return "\n".join(lines)


def _table_line(row: dict[str, Any], stock: dict[str, Any], rate: float | None) -> str:
    useful = row["useful_flops_per_s"]
    speed = memory = "1" if row["stack"] == "stock" else "-"
    if row["stack"] == "lean" and stock:
        speed = f"{row['tokens_per_s'] / stock['tokens_per_s']:.2f}"
        memory = f"{_required(row) / max(1, _required(stock)):.2f}"
    cells = [
        row["name"], row["stack"], format_seconds(row["step_s"]), f"{row['tokens_per_s']:.0f}",
        speed,
        f"{format_gib(row['peak_allocated_bytes'])} / {format_gib(row['peak_reserved_bytes'])}",
        f"{_gib(row['cap_passed_bytes'])} ({_gib(row['cap_failed_bytes'])})", memory,
        f"{useful / 1e12:.0f}", f"{useful / rate:.0%}" if rate else "-",
        format_gib(row["floor_bytes"]),
    ]  # fmt: skip
    return "| " + " | ".join(cells) + " |"


def _required(row: dict[str, Any]) -> int:
    """The smallest cap known to do; peak reserved where none was tried."""
    return int(row["cap_passed_bytes"] or row["peak_reserved_bytes"])


def _gib(size_bytes: int | None) -> str:
    return "-" if size_bytes is None else format_gib(size_bytes)


def _line(row: dict[str, Any]) -> str:
    if "error" in row:
        return f"FAILED {row['name']}: {row['error']}"
    if row.get("outcome"):
        return f"{row['stack']}: {row['name']}: {row['outcome']}"
    if "options_s" in row:
        took = {name: format_seconds(row[name]) for name in
                ("options_s", "generate_s", "generate_lean_s")}  # fmt: skip
        return (
            f"{row['name']}: option scoring {took['options_s']}; one token from 5 beams, on the "
            f"model as the seed prepares it {took['generate_s']}: {row['times_faster']:.1f} times; "
            f"on the model that was scored "
            f"{took['generate_lean_s']}: {row['times_faster_same_model']:.1f} times"
        )
    if "kernel_error" in row:
        return f"kernel check: largest error {row['kernel_error']:.2g} of the largest value"
    if "flops_per_s" in row:
        return f"{row['device']}, torch {row['torch']}: {row['flops_per_s'] / 1e12:.0f} TFLOP/s"
    return (
        f"{row['stack']}: {row['name']} {row['options'] or ''}: {format_seconds(row['step_s'])}, "
        f"{row['tokens_per_s']:.0f} tokens/s, {format_gib(row['peak_allocated_bytes'])} allocated, "
        f"{format_gib(row['peak_reserved_bytes'])} reserved, cap {_gib(row['cap_passed_bytes'])} "
        f"passed, {_gib(row['cap_failed_bytes'])} failed, first step "
        f"{format_seconds(row['first_step_s'])}, build {format_seconds(row['build_s'])}, "
        f"{row['useful_flops_per_s'] / 1e12:.0f} TFLOP/s, losses {row['first_losses']}"
    )


def _label(case: dict[str, Any]) -> str:
    return f"{case.get('spec', {}).get('stack', '')}: {case['name']}".removeprefix(": ")


def _tiny(case: dict[str, Any]) -> dict[str, Any]:
    """The case on a two-layer Chameleon of a CPU's size."""
    config = {
        "model_type": "chameleon", "vocab_size": 9000, "hidden_size": 64, "intermediate_size": 128,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4,
    }  # fmt: skip
    small = {"sequence_length": 32, "optimizer": "adamw_torch", "precision": "bf16"}
    options = {**case.get("options", {}), "compile": False}
    return {**case, "spec": {**case["spec"], **small}, "config": config, "options": options}


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
