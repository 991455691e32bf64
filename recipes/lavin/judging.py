"""Answers to ScienceQA questions, accuracy by the paper's columns, and what the routers did."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from recipes.data.encoding import Encoded
from recipes.evaluation.statistics import wilson_interval
from recipes.lavin.batches import LavinBatches
from recipes.lavin.build import BuiltLavin
from recipes.lavin.placement import adapters_of
from recipes.lavin.scienceqa import LETTERS, ScienceQuestion
from recipes.lavin.step import autocast

CATEGORIES = ("NAT", "SOC", "LAN", "TXT", "IMG", "NO", "G1-6", "G7-12", "AVG")
_AT_ONCE = 64


@dataclass(frozen=True, slots=True)
class ScienceAnswer:
    """index: the likeliest of the question's options; log_probabilities: of their letters."""

    index: int
    log_probabilities: tuple[float, ...]

    @property
    def letter(self) -> str:
        return LETTERS[self.index]


@dataclass(frozen=True, slots=True)
class Score:
    """right of total; the accuracy's 95 % interval; the one-sided p-value against guessing, each
    question by its own number of options."""

    right: int
    total: int
    accuracy: float
    low: float
    high: float
    p_above_chance: float


@torch.no_grad()
def answer_questions(
    built: BuiltLavin, samples: Sequence[Encoded], questions: Sequence[ScienceQuestion],
    letters: Sequence[int], pad_id: int,
) -> list[ScienceAnswer]:  # fmt: skip
    """Answers by the letters' log-probabilities at the end of each prompt, in order. The model
    is in eval mode meanwhile. Text-only and picture questions run apart."""
    answers: list[ScienceAnswer | None] = [None] * len(samples)
    for places, last in _last_hidden(built, samples, pad_id):
        with autocast(built):
            logits = built.model.language.lm_head(last)
        scores = torch.log_softmax(logits.float(), -1)
        scores = scores[:, list(letters)].cpu()
        for place, row in zip(places, scores, strict=True):
            own = row[: len(questions[place].choices)].tolist()
            best = max(range(len(own)), key=own.__getitem__)
            answers[place] = ScienceAnswer(best, tuple(own))
    return [answer for answer in answers if answer is not None]


def by_category(
    questions: Sequence[ScienceQuestion], answers: Sequence[ScienceAnswer]
) -> dict[str, Score]:
    """The paper's table; a column without questions is left out."""
    marks: dict[str, list[tuple[bool, float]]] = defaultdict(list)
    for question, answer in zip(questions, answers, strict=True):
        mark = answer.index == question.answer, 1 / len(question.choices)
        for category in question.categories:
            marks[category].append(mark)
    return {name: _score(marks[name]) for name in CATEGORIES if marks[name]}


def above_chances(right: int, chances: Sequence[float]) -> float:
    """P(at least `right` right) when each is guessed with its own chance: the tail of the
    Poisson-binomial distribution, by convolution."""
    counts = [1.0]
    for chance in chances:
        missed = [p * (1 - chance) for p in counts] + [0.0]
        hit = [0.0] + [p * chance for p in counts]
        counts = [a + b for a, b in zip(missed, hit, strict=True)]
    return min(1.0, sum(counts[right:]))


@torch.no_grad()
def routing_by_modality(
    built: BuiltLavin, samples: Sequence[Encoded], pad_id: int
) -> list[dict[str, Any]]:
    """Mean weights (w0, w1) of every adapter on text-only samples and on those with pictures, in
    the order of the layers; None for a modality that an adapter never met."""
    sums: dict[str, dict[str, Tensor]] = defaultdict(dict)
    counts: dict[tuple[str, str], int] = defaultdict(int)
    for places, _ in _last_hidden(built, samples, pad_id):
        modality = "text" if samples[places[0]].image is None else "picture"
        for name, adapter in adapters_of(built.model):
            weights = adapter.router.last
            if weights is None or (modality == "text" and name.startswith("vision")):
                continue
            before = sums[name].get(modality, torch.zeros(2))
            sums[name][modality] = before + weights.float().mean(0).cpu() * len(places)
            counts[name, modality] += len(places)
    return [
        {"adapter": name.removesuffix(".adapter"),
         **{m: (sums[name][m] / counts[name, m]).tolist() if m in sums[name] else None
            for m in ("text", "picture")}}
        for name, _ in adapters_of(built.model)
    ]  # fmt: skip


def _score(marks: Sequence[tuple[bool, float]]) -> Score:
    right, total = sum(mark for mark, _ in marks), len(marks)
    low, high = wilson_interval(right, total)
    chance = above_chances(right, [chance for _, chance in marks])
    return Score(right, total, right / total, low, high, chance)


def _last_hidden(
    built: BuiltLavin, samples: Sequence[Encoded], pad_id: int
) -> Iterator[tuple[list[int], Tensor]]:
    """(indices, hidden state after each one's last token), in groups of one modality and of near
    lengths. Rows are padded on the right, which no real position sees."""
    size: Any = built.config.vision.image_size
    loader = LavinBatches(samples, _AT_ONCE, 1, pad_id, 0, image_size=size,
                          blanks=built.config.published_batch)  # fmt: skip
    was_training = built.model.training
    built.model.eval()
    try:
        for places in _groups(samples):
            batch = loader.batch(places)
            with autocast(built):
                embedded, mask = built.model.inputs(
                    batch["input_ids"].to(built.device),
                    batch["pixel_values"].to(built.device) if "pixel_values" in batch else None,
                )
                hidden = built.model.language.model(
                    inputs_embeds=embedded, attention_mask=mask, use_cache=False
                ).last_hidden_state
            ends = torch.tensor([len(samples[place].ids) for place in places])
            rows = torch.arange(len(places), device=built.device)
            yield places, hidden[rows, ends.to(built.device)]  # the modality token is first
    finally:
        built.model.train(was_training)


def _groups(samples: Sequence[Encoded]) -> Iterator[list[int]]:
    order = sorted(
        range(len(samples)), key=lambda i: (samples[i].image is None, len(samples[i].ids))
    )
    pictured = sum(sample.image is not None for sample in samples)
    for part in (order[:pictured], order[pictured:]):
        for start in range(0, len(part), _AT_ONCE):
            yield part[start : start + _AT_ONCE]
