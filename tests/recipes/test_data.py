"""Readers on files in the published formats; encoding, masking and batching."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from planner.errors import InputError
from planner.spec_training import Data
from recipes.checks import check_samples
from recipes.data.batches import Batches
from recipes.data.encoding import Encoded, Encoder
from recipes.data.schemas import Sample, questions_of, samples_of
from recipes.data.tables import read_table
from recipes.demo_data import demo_config, demo_tokenizer, write_demo_data

ALPACA = [
    {"instruction": "Suma", "input": "2 y 2", "output": "4"},
    {"instruction": "Saluda", "input": "", "output": "Hola"},
]
MMMLU = {"": 0, "Question": "¿2+2?", "A": "1", "B": "4", "C": "3", "D": "5", "Answer": "B",
         "Subject": "abstract_algebra"}  # fmt: skip
GLOBAL = {
    "sample_id": "x/test/0", "subject": "astronomy", "subject_category": "STEM", "question": "¿q?",
    "option_a": "a", "option_b": "b", "option_c": "c", "option_d": "d", "answer": "C",
    "required_knowledge": None, "time_sensitive": None, "reference": None, "culture": None,
    "region": None, "country": None, "cultural_sensitivity_label": "-", "is_annotated": False,
}  # fmt: skip
CAIS = {"question": "q?", "subject": "law", "choices": ["w", "x", "y", "z"], "answer": 3}


def _parquet(path: Path, rows: list[dict]) -> Path:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def _csv(path: Path, rows: list[dict]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def test_alpaca_from_every_kind_of_file(tmp_path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(ALPACA), encoding="utf-8")
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, ALPACA)), encoding="utf-8")
    _csv(tmp_path / "a.csv", ALPACA)
    folder = tmp_path / "data"
    folder.mkdir()
    _parquet(folder / "train-00000-of-00001-abc.parquet", ALPACA)
    wanted = [Sample("Suma", "2 y 2", "4"), Sample("Saluda", "", "Hola")]
    for source in ("a.json", "a.jsonl", "a.csv", "data"):
        assert samples_of(read_table(str(tmp_path / source))) == wanted


@pytest.mark.parametrize(
    ("row", "answer", "subject"),
    [(MMMLU, 1, "abstract_algebra"), (GLOBAL, 2, "astronomy"), (CAIS, 3, "law")],
)
def test_questions_of_each_published_schema(row, answer, subject, tmp_path) -> None:
    write = _parquet if "choices" in row else _csv
    suffix = "parquet" if "choices" in row else "csv"
    (question,) = questions_of(read_table(str(write(tmp_path / f"test.{suffix}", [row]))))
    assert (question.answer, question.subject) == (answer, subject)
    assert len(question.options) == 4


def test_wrong_schema_is_told_by_column(tmp_path) -> None:
    rows = [{"instruction": "x", "imput": "", "ouput": "y"}]
    with pytest.raises(InputError) as caught:
        samples_of(read_table(str(_csv(tmp_path / "a.csv", rows))))
    text = str(caught.value)
    assert "data.input" in text
    assert "did you mean 'imput'" in text
    assert "data.output" in text


def test_bad_rows_are_told_by_number(tmp_path) -> None:
    rows = [*ALPACA, {"instruction": " ", "input": "", "output": "z"}, {"instruction": "a",
            "input": "", "output": None}]  # fmt: skip
    with pytest.raises(InputError) as caught:
        samples_of(read_table(str(_parquet(tmp_path / "a.parquet", rows))))
    assert "row 3" in str(caught.value)
    assert "row 4" in str(caught.value)


def test_bad_answers_are_told(tmp_path) -> None:
    for row, told in (({**MMMLU, "Answer": "E"}, "Answer"), ({**CAIS, "answer": 4}, "answer")):
        path = _parquet(tmp_path / "q.parquet", [row])
        with pytest.raises(InputError, match=told):
            questions_of(read_table(str(path)))


@pytest.mark.parametrize("text", ["", "{", "[1, 2]"])
def test_broken_files_are_told(text, tmp_path) -> None:
    path = tmp_path / "a.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match="cannot be read"):
        read_table(str(path))
    with pytest.raises(InputError, match="no such file"):
        read_table(str(tmp_path / "none.json"))


def _encoder(limit: int = 160, **template) -> Encoder:
    tokenizer = demo_tokenizer()
    return Encoder(tokenizer, demo_config(tokenizer), limit, Data(source="x", **template))


def _demo(tmp_path: Path) -> list[Sample]:
    train, _ = write_demo_data(tmp_path, 6, 4, 0)
    return samples_of(read_table(str(train)))


def test_only_the_answer_is_learned_and_images_are_masked(tmp_path) -> None:
    encoder = _encoder(instruction_alone="{instruction}")
    for sample in _demo(tmp_path):
        encoded = encoder.sample(sample)
        kept = [i for i, label in zip(encoded.ids, encoded.labels, strict=True) if label != -100]
        want = encoder.text(" " + sample.output)
        assert tuple(kept) == (*want, encoder.tokenizer.eos_token_id)
        assert encoded.ids.count(encoder.config.image_token_id) == 16
        everything = _encoder(labels="all", instruction_alone="{instruction}").sample(sample)
        masked = [i for i, x in zip(everything.ids, everything.labels, strict=True) if x == -100]
        assert sorted(masked) == sorted(encoder.image_ids)


def test_an_image_goes_where_the_text_says(tmp_path) -> None:
    encoder = _encoder(128, instruction_alone="{instruction}")
    sample = next(s for s in _demo(tmp_path) if "<image>" in s.instruction)
    ids = encoder.sample(sample).ids
    before = encoder.text(sample.instruction.partition("<image>")[0])
    assert ids[1 : 1 + len(before)] == before
    assert ids[1 + len(before) :][: len(encoder.image_ids)] == encoder.image_ids


def test_cut_answers_are_marked(tmp_path) -> None:
    encoded = _encoder(20).sample(_demo(tmp_path)[0])
    assert encoded.truncated
    assert len(encoded.ids) == len(encoded.labels) == 20


def _samples(lengths: list[int]) -> list[Encoded]:
    return [Encoded((5,) * n, (-100,) * (n - 1) + (5,), None, False) for n in lengths]


def test_batches_of_a_step_depend_on_seed_and_step_alone() -> None:
    samples = _samples([3 + i % 40 for i in range(100)])
    first, again = (Batches(samples, 4, 2, 0, seed=7) for _ in range(2))
    for step in (0, 5, 30):
        for a, b in zip(first.step(step), again.step(step), strict=True):
            assert a["input_ids"].equal(b["input_ids"])
    assert len(first.step(3)) == 2


def test_an_epoch_sees_every_sample_once() -> None:
    samples = [Encoded((i,) * (3 + i % 30), (i,) * (3 + i % 30), None, False) for i in range(96)]
    batches = Batches(samples, 4, 2, 0, seed=1)
    seen = [int(row[0]) for step in range(batches.steps_per_epoch) for b in batches.step(step)
            for row in b["input_ids"]]  # fmt: skip
    assert sorted(seen) == list(range(96))


def test_grouping_saves_padding_and_padding_is_masked() -> None:
    samples = _samples([3 + (i * 37) % 120 for i in range(256)])
    grouped = Batches(samples, 8, 1, 0, seed=1)
    plain = Batches(samples, 8, 1, 0, seed=1, group_by_length=False)
    full = Batches(samples, 8, 1, 0, seed=1, pad_to=128)
    assert grouped.padded_share() < 0.15 < plain.padded_share() < full.padded_share()
    batch = grouped.step(0)[0]
    assert (batch["labels"][batch["input_ids"] == 0] == -100).all()


def test_misaligned_labels_and_trained_images_are_errors() -> None:
    tokenizer = demo_tokenizer()
    config = demo_config(tokenizer)
    shifted = Encoded((150, 151, 152), (-100, 160, 161), None, False)
    image = Encoded((150, 5, 152), (-100, 5, 152), None, False)
    padded = Encoded((150, 0, 0), (-100, 0, 0), None, False)
    empty = Encoded((150, 151), (150, -100), None, False)
    for sample, word in ((shifted, "not their own"), (image, "image"), (padded, "padding"),
                         (empty, "nothing to learn")):  # fmt: skip
        found = check_samples([sample], config, 0)
        assert any(f.severity == "error" and word in f.text for f in found), word
    good = Encoded((150, 151, 152), (-100, 151, 152), None, False)
    assert check_samples([good], config, 0) == []
