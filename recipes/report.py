"""A whole run and its report: base against tuned, planned against measured, its files."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from planner.spec import RunSpec
from recipes.evaluation.questions import Question
from recipes.evaluation.results import Summary, compare, summarise, write_rich_csv, write_seed_csv
from recipes.evaluation.scoring import (
    Answer,
)
from recipes.train import Run


@dataclass(frozen=True, slots=True)
class Report:
    """What a run came to. losses: one a step, resumed steps included; base, tuned: None without
    questions; p_value: McNemar's, base against tuned; peaks are 0 off CUDA."""

    steps: int
    losses: list[float]
    seconds: float
    step_seconds: float
    tokens_per_second: float
    peak_allocated_bytes: int
    peak_reserved_bytes: int
    base: Summary | None
    tuned: Summary | None
    p_value: float | None
    planned: dict[str, Any] | None
    output: str

    def as_dict(self) -> dict[str, Any]:
        """A JSON-ready mapping."""
        return asdict(self)


def run(
    spec: RunSpec, output: Path, *, planned: dict[str, Any] | None = None, **arguments: Any
) -> Report:
    """Prepare, train to the end, judge base against tuned, write report.json and the CSV files."""
    run = Run(spec, output, **arguments)
    on_cuda = run.built.device.type == "cuda"
    if on_cuda:
        torch.cuda.reset_peak_memory_stats()
    base = run.answers(tuned=False) if run.prepared.questions else None
    began = time.perf_counter()
    losses = run.train()
    seconds = time.perf_counter() - began
    fresh = max(1, len(losses) - run.began_at)
    tokens = spec.micro_batch_size * spec.gradient_accumulation_steps * spec.sequence_length
    tuned = run.answers() if run.prepared.questions else None
    judged = judge(output, run.prepared.questions, base, tuned)
    report = Report(
        steps=len(losses), losses=losses, seconds=seconds, step_seconds=seconds / fresh,
        tokens_per_second=tokens * fresh / max(seconds, 1e-9),
        peak_allocated_bytes=torch.cuda.max_memory_allocated() if on_cuda else 0,
        peak_reserved_bytes=torch.cuda.max_memory_reserved() if on_cuda else 0,
        base=judged[0], tuned=judged[1], p_value=judged[2], planned=planned, output=str(output),
    )  # fmt: skip
    model: Any = run.built.model
    if hasattr(model, "save_pretrained"):
        model.save_pretrained(str(output / "adapter"), save_embedding_layers=False)
    if run.first_new_id is not None:
        rows = {
            n: p.detach()[run.first_new_id :].cpu().contiguous()
            for n, p in run.built.base.named_parameters()
            if p.requires_grad and "lora_" not in n
        }
        save_file(rows, output / "new_rows.safetensors")
    (output / "report.json").write_text(json.dumps(report.as_dict(), indent=1) + "\n", "utf-8")
    return report


def judge(
    output: Path, questions: list[Question], base: list[Answer] | None, tuned: list[Answer] | None
) -> tuple[Summary | None, Summary | None, float | None]:
    """Write the four CSV files; (base, tuned, McNemar's p-value), Nones without answers."""
    if base is None or tuned is None:
        return None, None, None
    write_seed_csv(output / "evaluation_results_base.csv", questions, base)
    write_seed_csv(output / "evaluation_results_testing.csv", questions, tuned)
    write_rich_csv(output / "evaluation_base.csv", questions, base, "base")
    write_rich_csv(output / "evaluation_tuned.csv", questions, tuned, "tuned")
    summaries = summarise(questions, base), summarise(questions, tuned)
    return (*summaries, compare(questions, base, tuned))
