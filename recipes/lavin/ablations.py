"""What LaVIN's choices are worth where they can be tried: `python -m recipes.lavin.ablations`.

The demo's two towers and questions; every row trains from the same towers, with the same batches
and steps, and differs from the baseline in what its name says. Writes a Markdown table.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model

from recipes.console import note
from recipes.evaluation.statistics import mcnemar_exact
from recipes.lavin.build import BuiltLavin, build_lavin
from recipes.lavin.demo import write_demo
from recipes.lavin.judging import Score, answer_questions, by_category
from recipes.lavin.spec import lavin_spec
from recipes.lavin.train import LavinRun

_NO_TEXT: dict[str, Any] = {"text_adapters": "none"}


@dataclass(frozen=True, slots=True)
class Variant:
    """lavin: changed settings of the `[lavin]` table; spec: of the planner's fields; change: what
    is done to the built model before it trains."""

    group: str
    name: str
    lavin: dict[str, Any] = field(default_factory=dict)
    spec: dict[str, Any] = field(default_factory=dict)
    change: Callable[[BuiltLavin], None] = lambda built: None
    learning_rate: float | None = None


@dataclass(frozen=True, slots=True)
class Row:
    """marks: right or wrong, question by question."""

    variant: Variant
    trained: int
    scores: dict[str, Score]
    marks: list[bool]
    loss: float


def lora(*targets: str) -> Callable[[BuiltLavin], None]:
    """Rank-8 LoRA on the language model's linears of these names."""

    def change(built: BuiltLavin) -> None:
        config = LoraConfig(r=8, lora_alpha=16, target_modules=list(targets))
        inject_adapter_in_model(config, built.model.language)

    return change


def full(built: BuiltLavin) -> None:
    """Every weight of the language model trains."""
    built.model.language.requires_grad_(True)


BASELINE = Variant("baseline", "before attention, every layer of both towers (published)")
VARIANTS = (
    Variant("placement", "before the MLP", {"text_adapters": "mlp", "vision_adapters": "mlp"}),
    Variant("placement", "before both", {"text_adapters": "both", "vision_adapters": "both"}),
    Variant("placement", "language model alone", {"vision_adapters": "none"}),
    Variant("placement", "vision tower alone", _NO_TEXT),
    Variant("placement", "neither: projector and modality token alone",
            {"text_adapters": "none", "vision_adapters": "none"}),
    Variant("placement", "first half of the layers", {"text_layers": [0, 1],
                                                      "vision_layers": [0, 1, 2]}),
    Variant("placement", "second half of the layers", {"text_layers": [2, 3],
                                                       "vision_layers": [3, 4, 5]}),
    Variant("placement", "every other layer", {"text_layers": [0, 2], "vision_layers": [0, 2, 4]}),
    Variant("adapter", "bottleneck 2", {"bottleneck": 2}),
    Variant("adapter", "bottleneck 32", {"bottleneck": 32}),
    Variant("adapter", "router temperature 1", {"temperature": 1.0}),
    Variant("adapter", "published batch behaviour", {"published_batch": True}),
    Variant("base", "language model in NF4", spec={"quantization": "nf4"}),
    Variant("method", "LoRA on q, v", _NO_TEXT, change=lora("q_proj", "v_proj")),
    Variant("method", "LoRA on q, k, v, o", _NO_TEXT,
            change=lora("q_proj", "k_proj", "v_proj", "o_proj")),
    Variant("method", "LoRA on all linears", _NO_TEXT,
            change=lora("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj",
                        "down_proj")),
    Variant("method", "LoRA on lm_head alone", _NO_TEXT, change=lora("lm_head")),
    Variant("method", "language model in full, rate / 5", _NO_TEXT, change=full,
            learning_rate=1e-3),
)  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Train every variant and write the table."""
    parser = argparse.ArgumentParser(prog="python -m recipes.lavin.ablations", description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("results/tables/lavin-ablations.md"))
    parser.add_argument("--folder", type=Path, default=Path("runs/lavin-ablations"),
                        help="towers and data; used again where they are")  # fmt: skip
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--questions", type=int, default=600)
    parser.add_argument("--only", help="variants whose group or name contains this")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    spec = arguments.folder / "spec.json"
    if not spec.is_file():
        write_demo(arguments.folder, note, arguments.steps, questions=arguments.questions)
    chosen = [v for v in VARIANTS if (arguments.only or "") in f"{v.group} {v.name}"]
    base = json.loads(spec.read_text(encoding="utf-8"))
    base["schedule"] |= {"max_steps": arguments.steps, "save_every_steps": None}
    rows = []
    for variant in (BASELINE, *chosen):
        rows.append(train_variant(variant, base, arguments.folder / "runs"))
        note(f"{variant.name}: {rows[-1].scores['AVG'].accuracy:.1%}")
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(markdown(rows, arguments.steps), encoding="utf-8")
    return 0


def train_variant(variant: Variant, base: dict[str, Any], folder: Path) -> Row:
    """One variant, trained from the towers and judged on the held-out questions."""
    values = base | variant.spec | {"lavin": base["lavin"] | variant.lavin}
    schedule = {k: v for k, v in base["schedule"].items() if v is not None}
    if variant.learning_rate is not None:
        schedule["learning_rate"] = variant.learning_rate
    spec, settings = lavin_spec(values | {"schedule": schedule})
    built = build_lavin(
        spec, settings.config(spec), "cpu", seed=spec.schedule.seed, language=settings.language,
        vision=settings.vision,
    )  # fmt: skip
    variant.change(built)
    run = LavinRun(spec, settings, folder, built=built)
    losses = [run.step.step(run.batches.step(index)).item() for index in range(run.steps)]
    answers = answer_questions(built, run.asked, run.questions, run.encoder.letters(), run.pad_id)
    return Row(
        variant, sum(p.numel() for p in built.model.trained_parameters().values()),
        by_category(run.questions, answers),
        [a.index == q.answer for a, q in zip(answers, run.questions, strict=True)],
        sum(losses[-20:]) / len(losses[-20:]),
    )  # fmt: skip


def markdown(rows: list[Row], steps: int) -> str:
    """The table: one row a variant, p against the first row's answers (McNemar, exact)."""
    base, some = rows[0], rows[0].scores
    lines = [
        "# LaVIN's choices on a model that learns here", "",
        "Made by `python -m recipes.lavin.ablations` (CPU, one seed). The demo's towers: a LLaMA "
        "of 4 layers of 64 that knows written descriptions and a CLIP tower of 6 layers of 64 that "
        f"knows pictures; {steps} steps of 32 questions in ScienceQA's layout; "
        f"{some['AVG'].total} held-out questions, {some['TXT'].total} with a text context and "
        f"{some['IMG'].total} with a picture. The projector and the modality token train in every "
        "row; method rows keep the vision tower's adapters, LoRA has rank 8. A difference whose p "
        "is above 0.05 is "
        "none that this table shows; nothing here says what a 7B would do.", "",
        "| group | variant | trained | text | picture | all (95 %) | p | last loss |",
        "| --- | --- | ---: | ---: | ---: | --- | ---: | ---: |",
    ]  # fmt: skip
    for row in rows:
        average = row.scores["AVG"]
        p = "" if row is base else f"{mcnemar_exact(base.marks, row.marks):.2g}"
        lines.append(
            f"| {row.variant.group} | {row.variant.name} | {row.trained:,} "
            f"| {row.scores['TXT'].accuracy:.1%} | {row.scores['IMG'].accuracy:.1%} "
            f"| {average.accuracy:.1%} ({average.low:.1%} to {average.high:.1%}) | {p} "
            f"| {row.loss:.4f} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    import sys

    sys.exit(main())
