"""The demo's world: drawn pictures, Spanish instructions and four-choice questions about them, and
a tokenizer of their words. Everything is made by a seed; nothing is read."""

from __future__ import annotations

import io
import itertools
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw
from tokenizers import Regex, pre_tokenizers
from transformers import ChameleonConfig, PretrainedConfig, PreTrainedTokenizerFast

from recipes.data.encoding import BEGIN_IMAGE, END_IMAGE
from recipes.evaluation.questions import LETTERS, SPANISH, Question, prompt_of
from recipes.models import chameleon_vocabulary_map
from recipes.tokenizers import word_tokenizer

COLOURS = {"rojo": (214, 40, 40), "verde": (46, 160, 67), "azul": (40, 80, 214),
           "amarillo": (240, 205, 40)}  # fmt: skip
SHAPES = ("círculo", "cuadrado", "triángulo", "anillo")
PLACES = ("arriba", "abajo", "izquierda", "derecha")
SIZE, CODES = 32, 128
_ASKS = {
    "colour": ("¿De qué color es la figura?", tuple(COLOURS)),
    "shape": ("¿Qué figura se ve?", SHAPES),
    "place": ("¿Dónde está la figura?", PLACES),
}


@dataclass(frozen=True, slots=True)
class Picture:
    """One figure of a colour on a grey ground, in one of four places."""

    colour: str
    shape: str
    place: str
    png: bytes

    def answer(self, ask: str) -> str:
        return str(getattr(self, ask))


def pictures(count: int, seed: int) -> Iterator[Picture]:
    """`count` pictures, all different in their bytes."""
    draw, seen = random.Random(seed), set[bytes]()
    while len(seen) < count:
        picture = _drawn(draw)
        if picture.png not in seen:
            seen.add(picture.png)
            yield picture


def write_demo_data(folder: Path, training: int, questions: int, seed: int) -> tuple[Path, Path]:
    """train.parquet (image, instruction, output) and test.parquet (image, question, choices,
    answer, subject), on disjoint sets of pictures. Returns the two paths."""
    drawn = list(pictures(training + questions, seed))
    draw = random.Random(seed + 1)
    train = [row for picture in drawn[:training] for row in _training_rows(picture, draw)]
    test = [_question_row(picture, draw) for picture in drawn[training:]]
    paths = folder / "train.parquet", folder / "test.parquet"
    for path, rows in zip(paths, (train, test), strict=True):
        _write_parquet(path, rows)
    return paths


def demo_tokenizer(
    image_codes: int = CODES, placeholder_id: int = 4 + CODES
) -> PreTrainedTokenizerFast:
    """A word-level tokenizer of the demo's words, laid out as Chameleon's: special tokens, image
    codes from id 4, the image's marks and placeholder, words."""
    codes = chameleon_vocabulary_map(image_codes, placeholder_id=placeholder_id)
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3, **codes}
    free = 4 + image_codes
    for name in (BEGIN_IMAGE, END_IMAGE, *sorted(_words())):
        if name not in vocabulary:
            vocabulary[name] = next(i for i in itertools.count(free) if i != placeholder_id)
            free = vocabulary[name] + 1
    return word_tokenizer(vocabulary, _splitter())


def demo_config(tokenizer: Any) -> PretrainedConfig:
    """A Chameleon of under a million parameters; a picture is 16 tokens."""
    return ChameleonConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=256,
        initializer_range=0.125,
        vocabulary_map=chameleon_vocabulary_map(CODES, placeholder_id=4 + CODES),
        vq_config={
            "num_embeddings": CODES, "embed_dim": 16, "latent_channels": 16, "resolution": SIZE,
            "base_channels": 32, "channel_multiplier": [1, 1, 1, 1], "num_res_blocks": 1,
        },
    )  # fmt: skip


def _drawn(draw: random.Random) -> Picture:
    colour, shape, place = draw.choice([*COLOURS]), draw.choice(SHAPES), draw.choice(PLACES)
    ground = (235, 235, 235)
    ink = tuple(max(0, min(255, c + draw.randint(-18, 18))) for c in COLOURS[colour])
    image = Image.new("RGB", (SIZE, SIZE), ground)
    half = draw.randint(7, 9)
    across = {"izquierda": 8, "derecha": SIZE - 9}.get(place, SIZE // 2) + draw.randint(-1, 1)
    down = {"arriba": 8, "abajo": SIZE - 9}.get(place, SIZE // 2) + draw.randint(-1, 1)
    box = (across - half, down - half, across + half, down + half)
    pen = ImageDraw.Draw(image)
    if shape == "cuadrado":
        pen.rectangle(box, fill=ink)
    elif shape == "triángulo":
        pen.polygon([(across, box[1]), (box[0], box[3]), (box[2], box[3])], fill=ink)
    else:
        pen.ellipse(box, fill=ink)
        if shape == "anillo":
            inner = half // 2
            pen.ellipse((across - inner, down - inner, across + inner, down + inner), fill=ground)
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return Picture(colour, shape, place, buffer.getvalue())


def _training_rows(picture: Picture, draw: random.Random) -> Iterator[dict[str, Any]]:
    caption = f"Un {picture.shape} {picture.colour}, {picture.place}."
    yield _row(picture, "Describe la imagen.", caption)
    for ask in _ASKS:
        question = _question(picture, ask, draw)
        text = SPANISH.prefix + "<image>" + prompt_of(question)
        yield _row(picture, text, LETTERS[question.answer])


def _row(picture: Picture, instruction: str, output: str) -> dict[str, Any]:
    return {"image": picture.png, "instruction": instruction, "input": "", "output": output}


def _question(picture: Picture, ask: str, draw: random.Random) -> Question:
    text, values = _ASKS[ask]
    return Question(text, values, values.index(picture.answer(ask)), ask, picture.png)  # type: ignore[arg-type]


def _question_row(picture: Picture, draw: random.Random) -> dict[str, Any]:
    question = _question(picture, draw.choice([*_ASKS]), draw)
    return {"image": picture.png, "question": question.text, "choices": list(question.options),
            "answer": question.answer, "subject": question.subject}  # fmt: skip


def _write_parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    import pyarrow
    import pyarrow.parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def _splitter() -> Any:
    """Words and single punctuation marks; blanks are dropped."""
    return pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(Regex(r"\w+|[^\w\s]"), "isolated")]
    )


def _words() -> set[str]:
    texts = [SPANISH.prefix, "Describe la imagen.", "Un ,.", SPANISH.ask, *LETTERS]
    for text, values in _ASKS.values():
        texts.append(prompt_of(Question(text, values, 0)))  # type: ignore[arg-type]
    words: set[str] = set()
    for text in texts:
        words.update(piece for piece, _ in _splitter().pre_tokenize_str(text))
    return words


def describe(folder: Path) -> str:
    """One line on what was written."""
    return json.dumps({path.name: path.stat().st_size for path in sorted(folder.glob("*.parquet"))})
