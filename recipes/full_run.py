"""The shipped 7B configuration, end to end: `python -m recipes.full_run --output FOLDER`.

Random weights, data in the published files' format: trains, is killed after a checkpoint, goes on,
evaluates and reports, each part through `vramwise train` in a process of its own. A machine's
acceptance test; on a CPU `--tiny` runs it on a small model.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import subprocess
import sys
import time
from pathlib import Path

from planner.spec import read_mapping
from recipes.console import out
from recipes.demo_data import COLOURS, PLACES, SHAPES, demo_config, demo_tokenizer
from recipes.evaluation.questions import LETTERS
from recipes.killing import kill_once_saved
from recipes.models import CHAMELEON_PLACEHOLDER_ID

_STEPS, _SAVE_EVERY = 12, 4


def main(argv: list[str] | None = None) -> int:
    """Run it; 0 when the killed run ended with every step's loss and a report."""
    parser = argparse.ArgumentParser(prog="python -m recipes.full_run", description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--tiny", action="store_true", help="a small model on the CPU")
    parser.add_argument("--seconds", type=float, default=280, help="limit of each of the two parts")
    arguments = parser.parse_args(argv)
    folder = arguments.output
    folder.mkdir(parents=True, exist_ok=True)
    spec = write_inputs(folder, arguments.tiny)
    command = [
        sys.executable, "-m", "planner.cli", "train", str(spec), "--output", str(folder / "run"),
        "--device", "cpu" if arguments.tiny else "cuda",
    ]  # fmt: skip
    second = f"step-{2 * _SAVE_EVERY:08d}.json"
    killed_at = kill_once_saved(command, folder / "run/checkpoints", second, arguments.seconds)
    began = time.monotonic()
    done = subprocess.run([*command, "--json"], capture_output=True, text=True, check=False,
                          timeout=arguments.seconds)  # fmt: skip
    if done.returncode:
        out(done.stderr[-2000:])
        return 1
    report = json.loads(done.stdout.strip().splitlines()[-1])
    out(f"killed after the checkpoint of step {killed_at}; the second part took "
        f"{time.monotonic() - began:.0f} s")  # fmt: skip
    out(done.stderr[-1500:])
    out(json.dumps({k: v for k, v in report.items() if k != "losses"}, indent=1))
    out(f"losses: {report['losses']}")
    return 0 if len(report["losses"]) == _STEPS and killed_at >= _SAVE_EVERY else 1


def write_inputs(folder: Path, tiny: bool) -> Path:
    """alpaca.json and mmmlu.csv with the published columns, a tokenizer, and the spec."""
    draw = random.Random(0)
    rows = [_instruction(draw) for _ in range(400)]
    (folder / "alpaca.json").write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    _write_questions(folder / "mmlu_ES-LA.csv", draw)
    tokenizer = demo_tokenizer() if tiny else demo_tokenizer(8192, CHAMELEON_PLACEHOLDER_ID)
    tokenizer.save_pretrained(folder / "model")
    values = read_mapping(str(Path(__file__).parent / "configs/chameleon-7b-spanish.toml"))
    if tiny:
        demo_config(tokenizer).save_pretrained(folder / "model")
        values |= {"model": str(folder / "model"), "quantization": "none", "sequence_length": 64,
                   "weights_dtype": "float32", "precision": "fp32", "optimizer": "adamw_torch",
                   "micro_batch_size": 2}  # fmt: skip
    values["schedule"] = {
        "max_steps": _STEPS, "save_every_steps": _SAVE_EVERY, "evaluate_every_steps": 6,
        "evaluation_samples": 16, "warmup_steps": 2,
    }  # fmt: skip
    values["data"] |= {"source": str(folder / "alpaca.json"), "tokenizer": str(folder / "model")}
    values["evaluation"] |= {"source": str(folder / "mmlu_ES-LA.csv"), "questions": 100}
    path = folder / "spec.json"
    path.write_text(json.dumps(values, indent=1), encoding="utf-8")
    return path


def _instruction(draw: random.Random) -> dict[str, str]:
    words = [*COLOURS, *SHAPES, *PLACES]
    some = " ".join(draw.choice(words) for _ in range(draw.randint(20, 200)))
    return {"instruction": "Describe la imagen", "input": some,
            "output": " ".join(draw.choice(words) for _ in range(draw.randint(5, 99)))}  # fmt: skip


def _write_questions(path: Path, draw: random.Random) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["", "Question", *LETTERS, "Answer", "Subject"])
        for index in range(200):
            text = "¿Qué figura se ve? " + " ".join(draw.choice(PLACES) for _ in range(40))
            subject = ("abstract_algebra", "astronomy", "law", "virology")[index // 50]
            writer.writerow([index, text, *SHAPES, draw.choice(LETTERS), subject])


if __name__ == "__main__":
    sys.exit(main())
