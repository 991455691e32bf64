"""`vramwise lavin demo`: LaVIN's adapters taught on a tiny model, offline, on a CPU.

Makes two towers that know words and pictures apart (`recipes.lavin.demo_base`) and a data set in
ScienceQA's own layout; trains the adapters between the frozen towers in a process that is killed
after a checkpoint; goes on from there; answers held-out questions, with and without pictures.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from recipes.console import note, out
from recipes.demo_arguments import demo_arguments
from recipes.demo_data import pictures
from recipes.killing import kill_once_saved
from recipes.lavin.demo_base import write_language_base, write_vision_base
from recipes.lavin.demo_data import demo_texts, demo_tokenizer, write_scienceqa
from recipes.lavin.report import report_text
from recipes.lavin.spec import lavin_spec
from recipes.lavin.train import LavinReport, LavinRun, run_lavin

TRAINING, QUESTIONS, STEPS, SEED = 4800, 300, 240, 0
LANGUAGE_STEPS, VISION_STEPS, VISION_PICTURES = 500, 240, 1200
P_LEARNED = 0.01


def run(argv: list[str]) -> int:
    """Entry point of the verb. Exit code 1 where a modality was not learned."""
    as_object, folder = demo_arguments(argv, "lavin demo", __doc__)
    began = time.perf_counter()
    killed_at, report = demo(folder, note)
    result = as_json(report, killed_at, time.perf_counter() - began)
    if as_object:
        out(json.dumps(result))
    else:
        out(report_text(report.as_dict()))
        out(
            f"\nkilled after step {killed_at}, gone on to {report.steps}; {result['seconds']:.0f} s"
        )
    return 0 if result["learned"] else 1


def demo(folder: Path, say: Any, steps: int = STEPS, **sizes: int) -> tuple[int, LavinReport]:
    """The whole demonstration in `folder`: (step of the checkpoint at the kill, report). sizes: as
    `write_demo` takes them."""
    spec = write_demo(folder, say, steps, **sizes)
    killed_at = train_and_kill(spec, folder / "run")
    say(f"killed after the checkpoint of step {killed_at}")
    return killed_at, run_lavin(_run(spec, folder / "run", say))


def write_demo(folder: Path, say: Any, steps: int = STEPS, language_steps: int = LANGUAGE_STEPS,
               vision_steps: int = VISION_STEPS, training: int = TRAINING,
               questions: int = QUESTIONS) -> Path:  # fmt: skip
    """Data, tokenizer, both towers and the spec; its path."""
    logging.disable_progress_bar()
    counts = {"train": training, "val": 32, "test": questions}
    data = write_scienceqa(folder / "data", counts, SEED)
    tokenizer = demo_tokenizer(demo_texts(data))
    say(f"{training} questions to train on and {questions} others in {data}")
    with contextlib.redirect_stderr(io.StringIO()):
        shown = list(itertools.islice(pictures(VISION_PICTURES, SEED + 1), VISION_PICTURES))
        with ProcessPoolExecutor(
            1, get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,)
        ) as pool:
            made = pool.submit(write_vision_base, folder / "vision", shown, vision_steps, SEED)
            language = write_language_base(folder / "language", tokenizer, language_steps, SEED)
            vision = made.result()
    say("two towers made, each for itself")
    path = folder / "spec.json"
    path.write_text(json.dumps(demo_spec(data, language, vision, steps), indent=1), "utf-8")
    return path


def demo_spec(data: Path, language: Path, vision: Path, steps: int) -> dict[str, Any]:
    """The demonstration as a run spec with its `[lavin]` table."""
    return {
        "model": "lavin", "quantization": "none", "weights_dtype": "float32", "precision": "fp32",
        "optimizer": "adamw_torch", "micro_batch_size": 32, "sequence_length": 96,
        "schedule": {"max_steps": steps, "learning_rate": 5e-3, "warmup_steps": 10,
                     "save_every_steps": max(1, steps // 8), "seed": SEED},
        "data": {"source": str(data)},
        "lavin": {"language": str(language), "vision": str(vision), "visual_every": 2,
                  "projector_size": 64, "dropout": 0.0, "prompt_format": "QCM-AE"},
    }  # fmt: skip


def train_and_kill(spec: Path, output: Path, limit_s: float = 120) -> int:
    """Train in a process of its own, kill it once a checkpoint is there: the step it had saved."""
    command = [sys.executable, "-m", "planner.cli", "lavin", "train", str(spec),
               "--output", str(output), "--device", "cpu"]  # fmt: skip
    root = str(Path(__file__).parents[2])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    return kill_once_saved(
        command, output / "checkpoints", limit_s=limit_s, OMP_NUM_THREADS="1", PYTHONPATH=path
    )


def as_json(report: LavinReport, killed_at: int, seconds: float) -> dict[str, Any]:
    """What `--json` prints."""
    after, before = report.after, report.before
    return {
        "learned": all(after[name].p_above_chance < P_LEARNED for name in ("TXT", "IMG")),
        "steps": report.steps, "killed_at_step": killed_at, "seconds": seconds,
        "trainable_parameters": report.trainable_parameters,
        "before": {name: score.accuracy for name, score in before.items()},
        "after": {name: score.accuracy for name, score in after.items()},
        "p_above_chance": {name: score.p_above_chance for name, score in after.items()},
        "questions": {name: score.total for name, score in after.items()},
        "routing": report.routing, "output": report.output,
    }  # fmt: skip


def _run(spec: Path, output: Path, say: Any) -> LavinRun:
    values = lavin_spec(json.loads(spec.read_text(encoding="utf-8")))
    return LavinRun(*values, output, device="cpu", say=say)
