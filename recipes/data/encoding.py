"""Samples and questions -> token ids, with every position labelled for what it is.

The answer is what is learned: prompt, image and padding positions carry the label -100. A prompt
and its answer are tokenised apart and joined, so that scoring sees the ids that training saw.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PretrainedConfig

from planner.errors import InputError, Problem
from planner.spec_training import Data
from recipes.data.schemas import Sample
from recipes.evaluation.questions import Question, Wording, prompt_of
from recipes.synthetic import image_tokens

IGNORED = -100
# As Chameleon's own tokenizer names the marks around an image; left out where it has none.
IMAGE_MARK = "<image>"
BEGIN_IMAGE, END_IMAGE = "<racm3:break>", "<eoss>"


@dataclass(frozen=True, slots=True)
class Encoded:
    """ids and labels of equal length; image: None without. truncated: the answer was cut."""

    ids: tuple[int, ...]
    labels: tuple[int, ...]
    image: str | bytes | None
    truncated: bool


@dataclass(frozen=True)
class Encoder:
    """Encodes for one tokenizer and one model. limit: tokens a sample may have."""

    tokenizer: Any
    config: PretrainedConfig
    limit: int
    template: Data

    @cached_property
    def image_ids(self) -> tuple[int, ...]:
        """Begin mark, placeholders, end mark; InputError for a model without image tokens."""
        placeholder = getattr(self.config, "image_token_id", None)
        if placeholder is None or not hasattr(self.config, "vq_config"):
            raise InputError(Problem("data", "has images, which this model does not take as tokens",
                                     self.config.model_type, "chameleon"))  # fmt: skip
        vocabulary = self.tokenizer.get_vocab()
        begin = [vocabulary[BEGIN_IMAGE]] if BEGIN_IMAGE in vocabulary else []
        end = [vocabulary[END_IMAGE]] if END_IMAGE in vocabulary else []
        return (*begin, *[placeholder] * image_tokens(self.config), *end)

    @property
    def start(self) -> tuple[int, ...]:
        """The begin-of-text token, where the tokenizer has one."""
        return () if self.tokenizer.bos_token_id is None else (self.tokenizer.bos_token_id,)

    @property
    def stop(self) -> tuple[int, ...]:
        return () if self.tokenizer.eos_token_id is None else (self.tokenizer.eos_token_id,)

    def text(self, text: str) -> tuple[int, ...]:
        """Ids of a text, no special tokens added."""
        return tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def prompt_text(self, sample: Sample) -> str:
        """The spec's template, filled in. An image goes where the text says `<image>`, first
        where it does not say."""
        plain = not sample.input.strip()
        words = self.template.instruction_alone if plain else self.template.instruction
        return words.format(instruction=sample.instruction.strip(), input=sample.input.strip())

    def sample(self, sample: Sample) -> Encoded:
        """A sample, cut to the limit at its end."""
        image = self.image_ids if sample.image is not None else ()
        before, marked, after = self.prompt_text(sample).partition(IMAGE_MARK)
        if not marked:
            before, after = "", before
        prompt = (*self.start, *self.text(before), *image, *self.text(after))
        answer = (*self.text(" " + sample.output.strip()), *self.stop)
        ids = (*prompt, *answer)[: self.limit]
        learned = self.template.labels == "all"
        masked = set(self.image_ids) if image else set()
        prompt_labels = [i if learned and i not in masked else IGNORED for i in prompt]
        labels = (*prompt_labels, *answer)[: self.limit]
        return Encoded(ids, labels, sample.image, len(prompt) + len(answer) > self.limit)

    def question(self, question: Question, wording: Wording) -> tuple[int, ...]:
        """Everything after the shared prefix of `wording`; image placeholders come first."""
        image = self.image_ids if question.image is not None else ()
        return (*image, *self.text(prompt_of(question, wording)))


def pixels(image: str | bytes, size: int) -> Tensor:
    """A picture as Chameleon takes it: (3, size, size), shortest side to `size` (Lanczos), centre
    cropped, about -1 to 1. Raises InputError for what cannot be read as a picture."""
    from PIL import Image, UnidentifiedImageError

    try:
        source = Path(image) if isinstance(image, str) else io.BytesIO(image)
        with Image.open(source) as opened:
            picture = opened.convert("RGB")
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        name = image if isinstance(image, str) else f"{len(image)} bytes"
        raise InputError(Problem("data.image", f"cannot be read: {error}", name)) from None
    scale = size / min(picture.size)
    width, height = (max(size, round(side * scale)) for side in picture.size)
    picture = picture.resize((width, height), Image.Resampling.LANCZOS)
    left, top = (width - size) // 2, (height - size) // 2
    picture = picture.crop((left, top, left + size, top + size))
    return torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1).float() * 0.0078 - 1.0
