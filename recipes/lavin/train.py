"""LaVIN trained and judged on ScienceQA, or trained on the dialogue mix: from the newest checkpoint
of a folder to the end."""

from __future__ import annotations

import json
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from planner.errors import InputError, Problem
from planner.spec import RunSpec
from recipes.data.encoding import IGNORED, Encoded
from recipes.evaluation.questions import stratified
from recipes.lavin.batches import LavinBatches
from recipes.lavin.build import BuiltLavin, build_lavin
from recipes.lavin.chat import read_chat
from recipes.lavin.judging import Score, answer_questions, by_category, routing_by_modality
from recipes.lavin.prompts import LavinEncoder, Turn, check_format, turn_of
from recipes.lavin.scienceqa import ScienceQuestion, read_scienceqa
from recipes.lavin.spec import LavinSettings
from recipes.lavin.step import LavinStep
from recipes.tokenizers import pad_id, read_tokenizer
from recipes.training_loop import Say, TrainingLoop


@dataclass(frozen=True, slots=True)
class LavinReport:
    """losses: one a step, resumed ones included; before, after: accuracy by category, empty without
    questions; routing: mean weights by adapter and modality; peaks are 0 off CUDA."""

    steps: int
    losses: list[float]
    seconds: float
    trainable_parameters: int
    before: dict[str, Score]
    after: dict[str, Score]
    routing: list[dict[str, Any]]
    peak_allocated_bytes: int
    peak_reserved_bytes: int
    output: str

    def as_dict(self) -> dict[str, Any]:
        """A JSON-ready mapping."""
        return asdict(self)


class LavinRun:
    """One training run on a folder. `train()` takes it from its newest checkpoint to its end."""

    def __init__(
        self, spec: RunSpec, settings: LavinSettings, output: Path, *, device: str = "cuda",
        tokenizer: Any = None, built: BuiltLavin | None = None, say: Say = lambda text: None,
    ) -> None:  # fmt: skip
        self.spec, self.settings, self.output, self.say = spec, settings, output, say
        check_format(settings.prompt_format)
        config = built.config if built else settings.config(spec)
        named = (spec.data.tokenizer if spec.data else None) or settings.language
        self.tokenizer = tokenizer or read_tokenizer(named)
        self.pad_id = pad_id(self.tokenizer)
        self.encoder = LavinEncoder(self.tokenizer, config.visual_tokens, spec.sequence_length - 1)
        size: Any = config.vision.image_size
        self.batches = LavinBatches(
            self._samples(), spec.micro_batch_size, spec.gradient_accumulation_steps, self.pad_id,
            spec.schedule.seed, spec.sequence_length - 1 if self._pads() else None,
            spec.data.group_by_length if spec.data else True,
            image_size=size, blanks=config.published_batch,
        )  # fmt: skip
        self.questions = self._questions()
        self.asked = [
            self.encoder.question(question, settings.prompt_format, settings.captions)
            for question in self.questions
        ]
        output.mkdir(parents=True, exist_ok=True)
        self.built = built or build_lavin(
            spec, config, device, seed=spec.schedule.seed, language=settings.language,
            vision=settings.vision,
        )  # fmt: skip
        by_epochs = math.ceil(spec.schedule.epochs * self.batches.steps_per_epoch)
        self.steps = spec.schedule.max_steps or by_epochs
        self.step = LavinStep(self.built, self.steps)
        identity = spec.model_dump_json() + settings.model_dump_json()
        self.loop = TrainingLoop(output, self.step, self.batches, self.steps, identity, say)

    def train(self, stop_after: int | None = None) -> list[float]:
        """Train to the end (or to step `stop_after`), saving as the spec says; all losses so far.
        Raises what `TrainingLoop.train` raises."""
        return self.loop.train(stop_after)

    def judge(self) -> dict[str, Score]:
        """Accuracy on the questions, by category; {} without any."""
        letters = self.encoder.letters() if self.questions else []
        answers = answer_questions(self.built, self.asked, self.questions, letters, self.pad_id)
        return by_category(self.questions, answers)

    def routing(self) -> list[dict[str, Any]]:
        """What the routers do on the questions, or on the first training samples without any."""
        samples = self.asked or list(self.batches.samples[:256])
        return routing_by_modality(self.built, samples, self.pad_id)

    def _samples(self) -> list[Encoded]:
        samples = [self.encoder.sample(turn) for turn in self._turns()]
        learnable = [s for s in samples if any(label != IGNORED for label in s.labels)]
        if not learnable:
            raise InputError(Problem("sequence_length", "leaves no answer of any sample",
                                     self.spec.sequence_length))  # fmt: skip
        gone, cut = len(samples) - len(learnable), sum(s.truncated for s in learnable)
        if gone or cut:
            self.say(f"of {len(samples)} samples {gone} are left out and {cut} answers cut: longer "
                     f"than {self.spec.sequence_length} tokens")  # fmt: skip
        return learnable

    def _turns(self) -> list[Turn]:
        data, settings = self.spec.data, self.settings
        if data is None:
            raise InputError(Problem("data.source", "is required to train"))
        if settings.format == "chat":
            return read_chat(data.source, settings.train_split)
        questions = read_scienceqa(data.source, settings.train_split)
        return [turn_of(q, settings.prompt_format, settings.captions) for q in questions]

    def _questions(self) -> list[ScienceQuestion]:
        data, settings, judged = self.spec.data, self.settings, self.spec.evaluation
        source = judged.source if judged else data.source if data else ""
        if settings.format == "chat" and judged is None:
            return []
        questions = read_scienceqa(source, settings.test_split, "evaluation.source")
        if settings.questions is None:
            return questions
        chosen: Any = questions  # stratified reads their subject alone
        return stratified(chosen, settings.questions, self.spec.schedule.seed)  # type: ignore[return-value]

    def _pads(self) -> bool:
        return self.spec.data is not None and self.spec.data.padding == "max_length"


def run_lavin(run: LavinRun) -> LavinReport:
    """Judge, train to the end, judge again, and write report.json."""
    on_cuda = run.built.device.type == "cuda"
    if on_cuda:
        torch.cuda.reset_peak_memory_stats()
    before = run.judge() if not run.loop.checkpoints.exists() else _judged_before(run.output)
    (run.output / "before.json").write_text(
        json.dumps({name: asdict(score) for name, score in before.items()}), encoding="utf-8"
    )
    began = time.perf_counter()
    losses = run.train()
    seconds = time.perf_counter() - began
    report = LavinReport(
        steps=len(losses), losses=losses, seconds=seconds,
        trainable_parameters=sum(
            p.numel() for p in run.built.model.trained_parameters().values()
        ),
        before=before, after=run.judge(), routing=run.routing(),
        peak_allocated_bytes=torch.cuda.max_memory_allocated() if on_cuda else 0,
        peak_reserved_bytes=torch.cuda.max_memory_reserved() if on_cuda else 0,
        output=str(run.output),
    )  # fmt: skip
    text = json.dumps(report.as_dict(), indent=1) + "\n"
    (run.output / "report.json").write_text(text, encoding="utf-8")
    return report


def _judged_before(output: Path) -> dict[str, Score]:
    """The first part's own judgement: a resumed run's model is no longer the base."""
    path = output / "before.json"
    if not path.is_file():
        return {}
    values = json.loads(path.read_text(encoding="utf-8"))
    return {name: Score(**score) for name, score in values.items()}
