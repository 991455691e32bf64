"""The planned fine-tune, run: from its newest checkpoint to its end, on either stack."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig

from planner.errors import InputError, Problem, UnsupportedError
from planner.spec import RunSpec
from recipes.base_changes import changed_base
from recipes.build import Built, build
from recipes.checks import Finding, check_model
from recipes.data.batches import Batches
from recipes.data.encoding import pixels
from recipes.evaluation.scoring import (
    Answer,
    Prompt,
    generate_answers,
    letter_ids,
    score_options,
)
from recipes.images import image_token_ids
from recipes.layers import decoder_layers
from recipes.lean import DEFAULT_OPTIONS, LeanOptions, LeanStep, reached_layers
from recipes.liger import apply_liger
from recipes.models import load_config
from recipes.preparing import (
    check_data,
    check_settings,
    corpus,
    prepare,
    tokenizer_of,
    total_steps,
    training_batches,
)
from recipes.tokenizers import pad_id
from recipes.train_stock import train_stock
from recipes.training_loop import Say, TrainingLoop
from recipes.vocabulary import train_new_rows


class Run:
    """One training run on a folder. `train()` takes it from its newest checkpoint to its end."""

    def __init__(
        self, spec: RunSpec, output: Path, *, device: str = "cuda",
        config: PretrainedConfig | None = None, tokenizer: Any = None,
        weights: str | Path = "random", say: Say = lambda text: None,
        options: LeanOptions = DEFAULT_OPTIONS,
    ) -> None:  # fmt: skip
        self.spec, self.output, self.say = spec, output, say
        output.mkdir(parents=True, exist_ok=True)
        changed = changed_base(
            spec, config or load_config(spec.model), tokenizer or tokenizer_of(spec), weights,
            output / "base", corpus(spec), say,
        )  # fmt: skip
        config, weights = changed.config, changed.weights
        self.prepared = prepare(spec, config, changed.tokenizer)
        self._stop_on_errors([*check_settings(spec), *check_data(spec, self.prepared)])
        self.built: Built = build(spec, config=config, device=device, weights=weights)
        self._change_model(changed.first_new_id)
        self._fill_images()
        self.batches = training_batches(spec, self.prepared)
        self.steps = total_steps(spec, self.batches)
        self._lean: LeanStep | None = None
        if spec.stack == "lean":
            self._lean = LeanStep(self.built, spec, total_steps=self.steps, options=options)
            self._loop = TrainingLoop(
                output, self._lean, self.batches, self.steps, spec.model_dump_json(), say
            )
        layers = len(decoder_layers(self.built.base))
        self._stop_on_errors(check_model(self.built.model, reached_layers(self.built), layers))
        self.losses: list[float] = []
        self.began_at = 0  # the step that `train` went on from
        self._base_answers: list[Answer] | None = None

    @property
    def lean(self) -> LeanStep:
        """The lean step; UnsupportedError on the stock stack, which has none."""
        if self._lean is None:
            raise UnsupportedError("the stock stack has no lean step")
        return self._lean

    def train(self, stop_after: int | None = None) -> list[float]:
        """Train to the end (or to step `stop_after`), saving as the spec says; all losses so far.
        Raises what `TrainingLoop.train` raises."""
        if self._lean is None:
            held_out, steps = self.prepared.held_out, stop_after or self.steps
            self.losses, self.began_at = train_stock(
                self.built, self.spec, self.batches, held_out, self.output, steps, self.say
            )
        else:
            self.losses = self._loop.train(stop_after, self._evaluate)
            self.began_at = self._loop.began_at
        return self.losses

    def held_out_loss(self) -> float:
        """Mean loss a token over the held-out samples; nan without any."""
        total, count = 0.0, 0
        held = Batches(
            self.prepared.held_out, self.spec.evaluation_batch_size or self.spec.micro_batch_size,
            1, pad_id(self.prepared.encoder.tokenizer), 0,
        )  # fmt: skip
        for start in range(0, len(self.prepared.held_out), held.size):
            places = range(start, min(start + held.size, len(self.prepared.held_out)))
            loss, tokens = self.lean.evaluate(held.batch(list(places)))
            total, count = total + loss.item(), count + tokens
        return total / count if count else math.nan

    def answers(self, tuned: bool = True) -> list[Answer]:
        """The spec's questions answered by the tuned model, or by the base under its adapters."""
        judged = self.spec.evaluation
        assert judged is not None
        prefix, prompts = self._prompts()
        model: Any = self.built.model
        base = self.built.base
        model.eval()
        try:
            if tuned or not hasattr(model, "disable_adapter"):
                return self._answers(prefix, prompts)
            with model.disable_adapter():
                return self._answers(prefix, prompts)
        finally:
            model.train()
            base.train()

    def _answers(self, prefix: tuple[int, ...], prompts: list[Prompt]) -> list[Answer]:
        judged, encoder, base = self.spec.evaluation, self.prepared.encoder, self.built.base
        assert judged is not None
        if judged.choose == "generate":
            return generate_answers(base, encoder.tokenizer, prefix, prompts, beams=judged.beams)
        letters = letter_ids(encoder.tokenizer, self.prepared.wording.ask)
        return score_options(base, prefix, prompts, letters)

    def _prompts(self) -> tuple[tuple[int, ...], list[Prompt]]:
        encoder, wording = self.prepared.encoder, self.prepared.wording
        prompts = []
        for question in self.prepared.questions:
            ids = encoder.question(question, wording)
            if question.image is not None:
                ids = self._filled(ids, self._tokens_of_images[question.image])
            prompts.append(Prompt(ids))
        return (*encoder.start, *encoder.text(wording.prefix)), prompts

    def _evaluate(self, done: int) -> None:
        """Tell the held-out loss where the spec asks for it after so many steps."""
        if done % (self.spec.schedule.evaluate_every_steps or self.steps + 1) == 0:
            self.say(f"step {done}: held-out loss {self.held_out_loss():.4f}")

    def _change_model(self, first_new_id: int | None) -> None:
        """Liger's kernels and trained new rows, as the spec asks for them."""
        self.first_new_id = first_new_id
        if self.spec.liger:
            apply_liger(self.built.base)
        if first_new_id is not None and self.spec.vocabulary is not None:
            if self.spec.vocabulary.train == "rows":
                self.built.model.requires_grad_(False)
            train_new_rows(self.built.base, first_new_id)

    def _fill_images(self) -> None:
        """Each image to its tokens, once, in the samples' own ids (the stock stack is handed
        pixels: there only the questions' images)."""
        lean = self.spec.stack == "lean"
        groups = (self.prepared.training, self.prepared.held_out) if lean else ()
        images = [s.image for samples in groups for s in samples if s.image is not None]
        tokens = self._image_tokens([*images, *(q.image for q in self.prepared.questions)])
        for samples in groups:
            for place, sample in enumerate(samples):
                if sample.image is not None:
                    ids = self._filled(sample.ids, tokens[sample.image])
                    samples[place] = replace(sample, ids=ids)
        self._tokens_of_images = tokens

    def _image_tokens(self, images: list[str | bytes | None]) -> dict[str | bytes, list[int]]:
        """Token ids of each distinct image, a few hundred pictures in memory at once."""
        distinct = [image for image in dict.fromkeys(images) if image is not None]
        found: dict[str | bytes, list[int]] = {}
        for start in range(0, len(distinct), 256):
            part = distinct[start : start + 256]
            size = self.built.config.vq_config.resolution
            ids = image_token_ids(self.built.base, torch.stack([pixels(i, size) for i in part]))
            found.update(zip(part, ids.tolist(), strict=True))
        return found

    def _filled(self, ids: tuple[int, ...], tokens: list[int]) -> tuple[int, ...]:
        """Placeholders replaced in order; a cut sample may hold fewer than all."""
        rest, placeholder = iter(tokens), self.built.config.image_token_id
        return tuple(next(rest) if i == placeholder else i for i in ids)

    def _stop_on_errors(self, findings: list[Finding]) -> None:
        for finding in findings:
            if finding.severity != "error":
                self.say(str(finding))
        errors = [f for f in findings if f.severity == "error"]
        if errors:
            raise InputError(Problem(finding.subject, finding.text) for finding in errors)
