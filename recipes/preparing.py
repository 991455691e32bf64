"""A run's data before any model is built: read, split, encoded, checked, in its order."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PretrainedConfig

from planner.errors import InputError, Problem
from planner.spec import RunSpec
from recipes.checks import (
    Finding,
    check_padding,
    check_precision,
    check_samples,
    check_schedule,
    check_seed_habits,
)
from recipes.data.batches import Batches
from recipes.data.encoding import Encoded, Encoder
from recipes.data.schemas import questions_of, samples_of
from recipes.data.tables import read_table
from recipes.evaluation.questions import ENGLISH, SPANISH, Question, Wording, stratified
from recipes.tokenizers import pad_id, read_tokenizer


@dataclass(frozen=True)
class Prepared:
    """A run's data, encoded: before any model is built. left_out: training samples whose prompt
    leaves no room for an answer."""

    encoder: Encoder
    training: list[Encoded]
    held_out: list[Encoded]
    questions: list[Question]
    wording: Wording
    left_out: int = 0


def prepare(spec: RunSpec, config: PretrainedConfig, tokenizer: Any) -> Prepared:
    """Read, split and encode the spec's data. Raises InputError; needs no model and no card."""
    if spec.data is None:
        raise InputError(Problem("data.source", "is required to train"))
    samples = samples_of(read_table(spec.data.source), spec.data.format)
    if spec.data.shuffle:
        order = torch.randperm(
            len(samples), generator=torch.Generator().manual_seed(spec.schedule.seed)
        )
        samples = [samples[place] for place in order.tolist()]
    encoder = Encoder(tokenizer, config, spec.sequence_length, spec.data)
    encoded = [encoder.sample(sample) for sample in samples]
    cut = max(1, int(len(encoded) * spec.data.train_fraction))
    if spec.schedule.samples is not None:
        encoded = [*encoded[:cut][: spec.schedule.samples], *encoded[cut:]]
        cut = min(cut, spec.schedule.samples)
    learnable = [e for e in encoded[:cut] if any(label != -100 for label in e.labels[1:])]
    held_out = encoded[cut:][: spec.schedule.evaluation_samples]
    wording = ENGLISH if spec.evaluation and spec.evaluation.language == "en" else SPANISH
    kept = learnable or encoded[:cut]  # where nothing can be learned, the check says so
    return Prepared(encoder, kept, held_out, _questions(spec), wording, cut - len(kept))


def check_settings(spec: RunSpec, step_s: float | None = None) -> list[Finding]:
    """Findings that need neither data nor model."""
    capability = torch.cuda.get_device_capability() if torch.cuda.is_available() else None
    steps = spec.schedule.max_steps
    scheduled = check_schedule(spec, steps, step_s) if steps else []
    return [*check_precision(spec, capability), *check_seed_habits(spec), *scheduled]


def check_data(spec: RunSpec, prepared: Prepared) -> list[Finding]:
    """Findings about the encoded samples and their batches."""
    config, tokenizer = prepared.encoder.config, prepared.encoder.tokenizer
    batches = training_batches(spec, prepared)
    steps = total_steps(spec, batches)
    gone = prepared.left_out
    left_out = Finding("warning", "sequence_length", f"{gone} samples are left out: their prompts "
                       f"fill {spec.sequence_length} tokens")  # fmt: skip
    return [
        *([left_out] if gone else []),
        *check_samples(prepared.training, config, tokenizer.pad_token_id),
        *check_padding(batches),
        *([] if spec.schedule.max_steps else check_schedule(spec, steps, None)),
    ]


def training_batches(spec: RunSpec, prepared: Prepared) -> Batches:
    """The run's batches, in their order."""
    data = spec.data
    assert data is not None
    return Batches(
        prepared.training, spec.micro_batch_size, spec.gradient_accumulation_steps,
        pad_id(prepared.encoder.tokenizer), spec.schedule.seed,
        spec.sequence_length if data.padding == "max_length" else None, data.group_by_length,
    )  # fmt: skip


def total_steps(spec: RunSpec, batches: Batches) -> int:
    """Optimizer steps of the whole run."""
    by_epochs = math.ceil(spec.schedule.epochs * batches.steps_per_epoch)
    return spec.schedule.max_steps or by_epochs


def _questions(spec: RunSpec) -> list[Question]:
    judged = spec.evaluation
    if judged is None:
        return []
    table = read_table(judged.source, "test", "evaluation.source")
    questions = questions_of(table, judged.format)
    if judged.sample == "first":
        return questions[: judged.questions]
    return stratified(questions, judged.questions, spec.schedule.seed)


def corpus(spec: RunSpec) -> list[str]:
    """The training texts that new tokens are chosen from; none where none are asked for."""
    if spec.vocabulary is None or spec.data is None:
        return []
    samples = samples_of(read_table(spec.data.source), spec.data.format)
    return [f"{s.instruction} {s.input} {s.output}" for s in samples]


def tokenizer_of(spec: RunSpec) -> Any:
    """The spec's tokenizer, or its model's. Raises InputError."""
    return read_tokenizer((spec.data.tokenizer if spec.data else None) or spec.model)
