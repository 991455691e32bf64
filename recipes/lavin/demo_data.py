"""The demo's world in ScienceQA's own layout: drawn pictures, questions about them, questions about
written descriptions, and the words that a base model is taught first. Made by a seed alone."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from tokenizers import Regex, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from recipes.demo_data import COLOURS, PLACES, SHAPES, Picture, pictures
from recipes.lavin.scienceqa import LETTERS
from recipes.tokenizers import word_tokenizer

_WORDS = dict(zip((*COLOURS, *SHAPES, *PLACES),
                  ("red", "green", "blue", "yellow", "circle", "square", "triangle", "ring",
                   "top", "bottom", "left", "right"), strict=True))  # fmt: skip
_KINDS: dict[str, tuple[str, ...]] = {
    "colour": tuple(COLOURS), "shape": SHAPES, "place": PLACES,
}  # fmt: skip
_QUESTIONS = {
    "colour": ("Which colour does the figure have?", "natural science", "grade2"),
    "shape": ("Which figure is it?", "social science", "grade5"),
    "place": ("Where is the figure?", "language science", "grade9"),
}
_FILLER = (
    "Image : Question : Which colour does the figure have ? Which figure is it ? Where is the "
    "figure ? Context : Options : Response : answer N / the a at ."
)
SAY = "say"
SPLITS = ("train", "val", "test")


def base_texts(count: int, seed: int) -> Iterator[str]:
    """What the base language model is taught: which of some options a description has, and to say
    the description again, amid words that mean nothing; it is asked by a word that no prompt of
    ScienceQA has. Nothing of a picture. The first half is without meaningless words, then there
    are more and more."""
    draw, meaningless = random.Random(seed), _FILLER.split()
    for index in range(count):
        most = max(0, 16 * index // count - 8)
        chosen = {kind: draw.choice(values) for kind, values in _KINDS.items()}
        kind = draw.choice([*_KINDS])
        options, answer = _options(kind, chosen[kind], draw)
        listed = " ".join(f"({x}) {o}" for x, o in zip(LETTERS, options, strict=False))
        filler = [" ".join(draw.choices(meaningless, k=draw.randint(0, most))) for _ in range(3)]
        described = _described(chosen)
        yield (f"{filler[0]} {described} {filler[1]} {listed} {filler[2]} {SAY} "
               f"{LETTERS[answer]}. BECAUSE: {described}")  # fmt: skip


def write_scienceqa(folder: Path, counts: dict[str, int], seed: int) -> Path:
    """problems.json, pid_splits.json and images/, half of each split's questions with a picture;
    no picture is in two splits."""
    drawn = pictures(sum(counts.values()), seed)
    draw = random.Random(seed + 1)
    problems: dict[str, dict[str, Any]] = {}
    splits: dict[str, list[str]] = {split: [] for split in SPLITS}
    for split, count in counts.items():
        for _ in range(count):
            qid, picture = str(len(problems) + 1), next(drawn)
            pictured = draw.random() < 0.5
            problems[qid] = _problem(picture, pictured, draw) | {"split": split}
            splits[split].append(qid)
            if pictured:
                place = folder / "images" / split / qid
                place.mkdir(parents=True, exist_ok=True)
                (place / "image.png").write_bytes(picture.png)
    folder.mkdir(parents=True, exist_ok=True)
    for name, values in (("problems", problems), ("pid_splits", splits)):
        (folder / f"{name}.json").write_text(json.dumps(values), encoding="utf-8")
    return folder


def demo_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """A word-level tokenizer of the texts' words."""
    words = {w for text in texts for w, _ in _splitter().pre_tokenize_str(text)}
    specials = ("<pad>", "<s>", "</s>", "<unk>")
    vocabulary = {word: index for index, word in enumerate((*specials, *sorted(words)))}
    return word_tokenizer(vocabulary, _splitter())


def demo_texts(folder: Path) -> Iterator[str]:
    """Every word the demo meets: the base's, the questions', the prompts'."""
    from recipes.lavin.prompts import turn_of
    from recipes.lavin.scienceqa import read_scienceqa

    yield from base_texts(500, 0)
    yield f"{SAY} Image: N/A (A) (B) (C) (D) (E) The answer is A. B. C. D. E."
    for split in SPLITS:
        for question in read_scienceqa(str(folder), split):
            turn = turn_of(question, "QCM-ALE")
            yield f"{turn.prompt} {turn.answer}"


def _splitter() -> Any:
    """Words, marks, and an option's letter in its brackets; blanks are dropped."""
    pieces = Regex(r"\([A-E]\)|\w+|[^\w\s]")
    return pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(pieces, "isolated")]
    )


def _problem(picture: Picture, pictured: bool, draw: random.Random) -> dict[str, Any]:
    kind = draw.choice([*_KINDS])
    question, subject, grade = _QUESTIONS[kind]
    chosen = {name: picture.answer(name) for name in _KINDS}
    options, answer = _options(kind, chosen[kind], draw)
    described = _described(chosen)
    return {
        "question": question, "choices": options, "answer": answer,
        "hint": "" if pictured else described, "image": "image.png" if pictured else None,
        "task": "closed choice", "grade": grade, "subject": subject, "topic": kind,
        "category": kind, "skill": question, "lecture": "", "solution": described,
    }  # fmt: skip


def _options(kind: str, value: str, draw: random.Random) -> tuple[list[str], int]:
    """Two to four values in any order, the right one among them."""
    others = [v for v in _KINDS[kind] if v != value]
    chosen = [value, *draw.sample(others, draw.randint(1, 3))]
    draw.shuffle(chosen)
    return [_WORDS[v] for v in chosen], chosen.index(value)


def _described(chosen: dict[str, str]) -> str:
    words = {kind: _WORDS[value] for kind, value in chosen.items()}
    return f"a {words['colour']} {words['shape']} at the {words['place']}."
