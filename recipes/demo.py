"""`vramwise demo`: a tiny Chameleon taught to answer about pictures, offline, on a CPU.

Makes a model, a tokenizer, pictures, Spanish instructions and four-choice questions; trains with
the code that trains the 7B; is stopped half way and goes on from its checkpoint; then answers
questions about pictures it was not trained on, before and after.
"""

from __future__ import annotations

import itertools
import json
import time
from pathlib import Path
from typing import Any

import torch

from planner.spec import RunSpec, spec_from_mapping
from recipes.cli import report_text
from recipes.console import note, out
from recipes.data.encoding import pixels
from recipes.demo_arguments import demo_arguments
from recipes.demo_data import SIZE, demo_config, demo_tokenizer, pictures, write_demo_data
from recipes.demo_model import write_demo_model
from recipes.report import Report, judge
from recipes.train import Run

TRAINING_PICTURES, QUESTIONS, STEPS, SEED = 1500, 200, 900, 0


def run(argv: list[str]) -> int:
    """Entry point of the verb. Exit code 1 where the tuned model is not better than the base."""
    as_object, folder = demo_arguments(argv, "demo", __doc__)
    began = time.perf_counter()
    report = demo(folder, note)
    seconds = time.perf_counter() - began
    if as_object:
        out(json.dumps(as_json(report, seconds)))
    else:
        out(report_text(report.as_dict()))
        out(f"{seconds:.0f} s in all; answers: {report.output}/evaluation_results_testing.csv")
    assert report.tuned is not None
    assert report.base is not None
    assert report.p_value is not None
    better = report.tuned.right > report.base.right and report.p_value < 0.01
    return 0 if better else 1


def demo(folder: Path, say: Any, steps: int = STEPS) -> Report:
    """The whole demonstration in `folder`: data, model, training in two halves, both judgements."""
    train, test = write_demo_data(folder / "data", TRAINING_PICTURES, QUESTIONS, SEED)
    tokenizer = demo_tokenizer()
    some = [pixels(p.png, SIZE) for p in itertools.islice(pictures(300, SEED), 300)]
    config = demo_config(tokenizer)
    model = write_demo_model(folder / "model", config, tokenizer, torch.stack(some), SEED)
    spec = demo_spec(train, test, model, steps)
    say(f"{TRAINING_PICTURES} pictures, {QUESTIONS} questions about others, in {folder}")
    output = folder / "run"
    arguments: dict[str, Any] = {"device": "cpu", "weights": model, "say": say}
    began = time.perf_counter()
    first = Run(spec, output, **arguments)
    base = first.answers(tuned=False)
    first.train(stop_after=steps // 2)
    say(f"stopped at step {steps // 2}, all but the checkpoint forgotten")
    del first
    second = Run(spec, output, **arguments)
    losses = second.train()
    seconds = time.perf_counter() - began
    judged = judge(output, second.prepared.questions, base, second.answers())
    return Report(
        steps=len(losses), losses=losses, seconds=seconds, step_seconds=seconds / len(losses),
        tokens_per_second=spec.micro_batch_size * spec.sequence_length * len(losses) / seconds,
        peak_allocated_bytes=0, peak_reserved_bytes=0, base=judged[0], tuned=judged[1],
        p_value=judged[2], planned=None, output=str(output),
    )  # fmt: skip


def demo_spec(train: Path, test: Path, model: Path, steps: int) -> RunSpec:
    """The demonstration as a run spec."""
    return spec_from_mapping(
        {
            "model": str(model), "stack": "lean", "quantization": "none",
            "weights_dtype": "float32", "precision": "fp32", "optimizer": "adamw_torch",
            "micro_batch_size": 16, "sequence_length": 128,
            "method": "full",  # the base is at random weights: adapters alone learn little of it
            "schedule": {"max_steps": steps, "learning_rate": 2e-3, "warmup_steps": 20,
                         "save_every_steps": max(1, steps // 2), "evaluation_samples": 32},
            "data": {"source": str(train), "instruction_alone": "{instruction}",
                     "train_fraction": 0.98},
            "evaluation": {"source": str(test), "questions": QUESTIONS},
        }
    )  # fmt: skip


def as_json(report: Report, seconds: float) -> dict[str, Any]:
    """What `--json` prints."""
    assert report.base is not None
    assert report.tuned is not None
    return {
        "base_accuracy": report.base.accuracy, "tuned_accuracy": report.tuned.accuracy,
        "p_value": report.p_value, "questions": report.tuned.questions, "seconds": seconds,
        "csv": f"{report.output}/evaluation_results_testing.csv",
    }  # fmt: skip
