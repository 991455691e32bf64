"""Questions and dialogue turns -> words -> token ids with visual placeholders and labels.

A prompt format is "IN-OUT" as ScienceQA's authors name them: IN the order of Question, Context and
Multiple options, OUT the Answer, then Lecture and Explanation in an order: "QCM-ALE", "CQM-A".
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from planner.errors import InputError, Problem, UnsupportedError
from recipes.data.encoding import IGNORED, Encoded
from recipes.lavin.model import IMAGE_PLACEHOLDER
from recipes.lavin.scienceqa import LETTERS, ScienceQuestion

ASK = "The answer is"
_BEFORE_PICTURE, _NO_PICTURE = "Image:", "Image: N/A"


@dataclass(frozen=True, slots=True)
class Turn:
    """What is asked and what is to be said."""

    prompt: str
    answer: str
    image: str | bytes | None = None


def check_format(prompt_format: str) -> str:
    """The format itself, or InputError."""
    before, _, after = prompt_format.partition("-")
    distinct = len(set(before)) == len(before) and len(set(after)) == len(after)
    if not (distinct and re.fullmatch(r"[QCM]{3}-A[LE]{0,2}", prompt_format)):
        raise InputError(Problem("lavin.prompt_format", "is none", prompt_format,
                                 "IN-OUT such as QCM-ALE, CQM-A"))  # fmt: skip
    return prompt_format


def turn_of(question: ScienceQuestion, prompt_format: str, captions: bool = False) -> Turn:
    """A question in a format. What is said begins with the answer's letter."""
    before, after = check_format(prompt_format).split("-")
    letters = zip(LETTERS, question.choices, strict=False)
    context = " ".join(filter(None, [question.hint, question.caption if captions else ""]))
    parts = {
        "Q": f"Question: {question.question}",
        "C": f"Context: {context or 'N/A'}",
        "M": "Options: " + " ".join(f"({letter}) {choice}" for letter, choice in letters),
    }
    asked = "\n".join(parts[part] for part in before) + "\nResponse:"
    said = {"A": f"{ASK} {question.letter}.", "L": question.lecture, "E": question.solution}
    texts = [said[part] for part in after if said[part].strip()]
    answer = texts[0] + (" BECAUSE: " + " ".join(texts[1:]) if len(texts) > 1 else "")
    return Turn(asked, answer, question.image)


@dataclass(frozen=True)
class LavinEncoder:
    """limit: ids a sample may have, the modality token aside; visual_tokens: a picture's."""

    tokenizer: Any
    visual_tokens: int
    limit: int

    def text(self, text: str) -> tuple[int, ...]:
        """Ids of a text, no special tokens added."""
        return tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def prompt(self, turn: Turn) -> tuple[int, ...]:
        """Begin token, whether there is a picture, its placeholders, the words."""
        bos, pictured = self.tokenizer.bos_token_id, turn.image is not None
        picture = (IMAGE_PLACEHOLDER,) * self.visual_tokens if pictured else ()
        return (
            *(() if bos is None else (bos,)),
            *self.text(_BEFORE_PICTURE if pictured else _NO_PICTURE), *picture,
            *self.text("\n" + turn.prompt),
        )  # fmt: skip

    def sample(self, turn: Turn) -> Encoded:
        """A turn, cut at its end; the answer and the end token are what is learned."""
        prompt, eos = self.prompt(turn), self.tokenizer.eos_token_id
        answer = (*self.text(" " + turn.answer), *(() if eos is None else (eos,)))
        ids = (*prompt, *answer)[: self.limit]
        labels = (*([IGNORED] * len(prompt)), *answer)[: self.limit]
        return Encoded(ids, labels, turn.image, len(prompt) + len(answer) > self.limit)

    def question(self, question: ScienceQuestion, prompt_format: str, captions: bool) -> Encoded:
        """Everything up to the answer's letter; cut from the left of the words, so that the
        question's end and the picture stay."""
        turn = turn_of(question, prompt_format, captions)
        asked = (*self.prompt(turn), *self.text(" " + ASK))
        cut = max(0, len(asked) - self.limit)
        head = len(self.prompt(Turn("", "", turn.image)))
        ids = (*asked[:head], *asked[head + cut :])
        return Encoded(ids, (IGNORED,) * len(ids), turn.image, cut > 0)

    def letters(self) -> list[int]:
        """The token of each letter right after the words that ask for it. Raises UnsupportedError
        where one is more than one token."""
        asked = self.text(" " + ASK)
        found = []
        for letter in LETTERS:
            ids = self.text(f" {ASK} {letter}")
            if ids[: len(asked)] == asked and len(ids) == len(asked) + 1:
                found.append(ids[-1])
        if len(set(found)) != len(LETTERS):
            raise UnsupportedError("the tokenizer does not write each of A to E as one token")
        return found
