"""ScienceQA's two layouts, the dialogue mix, prompts, and accuracy by the paper's columns."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from planner.errors import InputError
from recipes.evaluation.statistics import above_chance
from recipes.lavin.chat import read_chat
from recipes.lavin.demo_data import demo_texts, demo_tokenizer, write_scienceqa
from recipes.lavin.judging import ScienceAnswer, above_chances, by_category
from recipes.lavin.model import IMAGE_PLACEHOLDER
from recipes.lavin.prompts import LavinEncoder, check_format, turn_of
from recipes.lavin.scienceqa import COLUMNS, read_scienceqa


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    counts = {"train": 12, "val": 4, "test": 8}
    return write_scienceqa(tmp_path_factory.mktemp("sqa"), counts, 0)


def _hub_rows(folder, split):
    problems = json.loads((folder / "problems.json").read_text())
    rows = []
    for qid in json.loads((folder / "pid_splits.json").read_text())[split]:
        row = {name: problems[qid][name] for name in COLUMNS}
        if row["image"] is not None:
            path = folder / "images" / split / qid / "image.png"
            row["image"] = {"bytes": path.read_bytes(), "path": "image.png"}
        rows.append(row)
    return rows


def test_both_layouts_hold_the_same_questions(folder, tmp_path) -> None:
    (tmp_path / "data").mkdir()
    for split, name in (("train", "train"), ("val", "validation"), ("test", "test")):
        table = pyarrow.Table.from_pylist(_hub_rows(folder, split))
        path = tmp_path / "data" / f"{name}-00000-of-00001-abc.parquet"
        pyarrow.parquet.write_table(table, path)
        hub, original = (read_scienceqa(str(f), split) for f in (tmp_path, folder))
        assert len(hub) == len(original) > 0
        for one, other in zip(hub, original, strict=True):
            assert (one.question, one.choices, one.answer, one.hint, one.grade, one.categories) == (
                other.question, other.choices, other.answer, other.hint, other.grade,
                other.categories)  # fmt: skip
            if other.image is not None:
                assert Path(other.image).read_bytes() == one.image


def _changed(folder, tmp_path, change):
    values = json.loads((folder / "problems.json").read_text())
    change(values)
    (tmp_path / "problems.json").write_text(json.dumps(values))
    (tmp_path / "pid_splits.json").write_text((folder / "pid_splits.json").read_text())
    return str(tmp_path)


def _drop(name, some=False):
    def change(values):
        for qid in list(values)[: 1 if some else None]:
            del values[qid][name]

    return change


def _set(name, value):
    def change(values):
        for problem in values.values():
            problem.update({"image": None, name: value})

    return change


@pytest.mark.parametrize(("change", "told"), [
    (_drop("hint"), r"data\.source\.hint: a column that the scienceqa format needs is missing"),
    (_drop("choices", some=True), r"data\.source\.choices: is missing from 1 of 12 problems"),
    (_set("answer", 7), r"row 1: answer is not 0 to"),
    (_set("grade", "third"), r"row 1: grade is not grade1 to grade12"),
    (_set("subject", "magic"), r"row 1: subject is not one of natural science"),
    (lambda values: values.pop("1"), r"pid_splits: names 1 questions that problems\.json lacks"),
])  # fmt: skip
def test_a_wrong_schema_is_told_by_column(folder, tmp_path, change, told) -> None:
    with pytest.raises(InputError, match=told):
        read_scienceqa(_changed(folder, tmp_path, change), "train")


def test_a_missing_picture_is_told(folder, tmp_path) -> None:
    source = _changed(folder, tmp_path, lambda values: None)
    with pytest.raises(InputError, match=r"image file 'images/train/\d+/image\.png'"):
        read_scienceqa(source, "train")


def test_the_dialogue_mix(tmp_path, folder) -> None:
    row = {"instruction": "Say hello.", "answer": "Hello.", "image": None, "image_source": "",
           "options": None, "qid": "1"}  # fmt: skip
    coco = row | {"image": "000000000009.jpg", "image_source": "mscoco"}
    science = row | {"image": "image.png", "image_source": "sqa", "qid": "7"}
    (tmp_path / "images/train2014").mkdir(parents=True)
    (tmp_path / "images/train2014/COCO_train2014_000000000009.jpg").write_bytes(b"x")
    (tmp_path / "images/train/7").mkdir(parents=True)
    (tmp_path / "images/train/7/image.png").write_bytes(b"x")
    path = tmp_path / "all_data.json"
    path.write_text(json.dumps({"train": [row, coco, science]}))
    turns = read_chat(str(tmp_path))
    assert [turn.image is None for turn in turns] == [True, False, False]
    assert turns[1].image.endswith("COCO_train2014_000000000009.jpg")
    assert turns[2].image.endswith("images/train/7/image.png")
    path.write_text(json.dumps({"train": [{k: v for k, v in row.items() if k != "answer"}]}))
    with pytest.raises(InputError, match=r"data\.source\.answer: a column"):
        read_chat(str(tmp_path))
    path.write_text(json.dumps([row]))
    with pytest.raises(InputError, match="lists, one a split"):
        read_chat(str(tmp_path))


def test_prompt_formats(folder) -> None:
    question = read_scienceqa(str(folder), "train")[0]
    turn = turn_of(question, "CMQ-AE")
    assert turn.prompt.index("Context:") < turn.prompt.index("Options:")
    assert turn.prompt.index("Options:") < turn.prompt.index("Question:")
    assert turn.answer == f"The answer is {question.letter}. BECAUSE: {question.solution}"
    assert turn_of(question, "QCM-A").answer == f"The answer is {question.letter}."
    for wrong in ("QQM-A", "QCM-LA", "QCM", "QC-A", "QCM-AA"):
        with pytest.raises(InputError, match="prompt_format"):
            check_format(wrong)


def test_encoded_samples(folder) -> None:
    encoder = LavinEncoder(demo_tokenizer(demo_texts(folder)), 3, 90)
    letters = encoder.letters()
    for question in read_scienceqa(str(folder), "train"):
        sample = encoder.sample(turn_of(question, "QCM-A"))
        asked = encoder.question(question, "QCM-A", False)
        assert sample.ids.count(IMAGE_PLACEHOLDER) == (3 if question.image else 0)
        assert sample.ids[: len(asked.ids)] == asked.ids
        assert sample.ids[len(asked.ids)] == letters[question.answer]
        learned = [i for i, label in zip(sample.ids, sample.labels, strict=True) if label != -100]
        assert learned == list(sample.ids[len(asked.ids) - 3 :])
        short = LavinEncoder(encoder.tokenizer, 3, len(asked.ids) - 2)
        cut = short.question(question, "QCM-A", False).ids
        assert len(cut) == len(asked.ids) - 2
        assert cut[-5:] == asked.ids[-5:]
        assert cut.count(IMAGE_PLACEHOLDER) == (3 if question.image else 0)


def test_accuracy_by_the_papers_columns(folder) -> None:
    questions = read_scienceqa(str(folder), "test")
    answers = [ScienceAnswer(q.answer if i % 2 else (q.answer + 1) % len(q.choices), ())
               for i, q in enumerate(questions)]  # fmt: skip
    table = by_category(questions, answers)
    assert table["AVG"].total == len(questions)
    assert table["AVG"].right == len(questions) // 2
    assert sum(table[n].total for n in ("NAT", "SOC", "LAN") if n in table) == len(questions)
    assert sum(table[n].total for n in ("G1-6", "G7-12") if n in table) == len(questions)
    assert table["IMG"].total == sum(q.image is not None for q in questions)


def test_the_chance_of_guessing_each_question() -> None:
    assert above_chances(9, [0.25] * 20) == pytest.approx(above_chance(9, 20))
    chances = [0.5, 0.3, 0.25, 0.2]
    for right in range(5):
        wanted = 0.0
        for hits in itertools.product((0, 1), repeat=4):
            if sum(hits) >= right:
                p = 1.0
                for hit, chance in zip(hits, chances, strict=True):
                    p *= chance if hit else 1 - chance
                wanted += p
        assert above_chances(right, chances) == pytest.approx(wanted)
