"""Four-choice questions: their type, the prompt that asks them, and fair samples of them."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

LETTERS = ("A", "B", "C", "D")


@dataclass(frozen=True, slots=True)
class Question:
    """answer: index of the right option; image: a file's path or its bytes, None without."""

    text: str
    options: tuple[str, str, str, str]
    answer: int
    subject: str = ""
    image: str | bytes | None = None

    @property
    def letter(self) -> str:
        return LETTERS[self.answer]


@dataclass(frozen=True, slots=True)
class Wording:
    """The words around a question. `prefix` is the same for every question and is computed once."""

    prefix: str
    question: str
    options: str
    ask: str


SPANISH = Wording(
    "Responde únicamente con la letra de la opción correcta (A, B, C o D), sin explicaciones.\n\n",
    "Pregunta: {text}\n", "Opciones:\n{options}\n", "Letra:",
)  # fmt: skip
ENGLISH = Wording(
    "Answer only with the letter of the correct option (A, B, C or D), with no explanation.\n\n",
    "Question: {text}\n", "Options:\n{options}\n", "Letter:",
)  # fmt: skip


def prompt_of(question: Question, wording: Wording = SPANISH) -> str:
    """Everything after the shared prefix."""
    options = "\n".join(
        f"{letter}. {o}" for letter, o in zip(LETTERS, question.options, strict=True)
    )
    return (
        wording.question.format(text=question.text)
        + wording.options.format(options=options)
        + wording.ask
    )


def stratified(questions: Sequence[Question], count: int, seed: int = 0) -> list[Question]:
    """`count` questions with every subject in its share (largest remainders), drawn by `seed`,
    in the order of the file. All of them where there are no more than `count`."""
    if count >= len(questions):
        return list(questions)
    by_subject: dict[str, list[int]] = defaultdict(list)
    for index, question in enumerate(questions):
        by_subject[question.subject].append(index)
    shares = {s: count * len(places) / len(questions) for s, places in by_subject.items()}
    quotas = {s: int(share) for s, share in shares.items()}
    left = count - sum(quotas.values())
    for subject in sorted(shares, key=lambda s: (quotas[s] - shares[s], s))[:left]:
        quotas[subject] += 1
    draw = random.Random(seed)
    chosen = [i for s in sorted(by_subject) for i in draw.sample(by_subject[s], quotas[s])]
    return [questions[index] for index in sorted(chosen)]
