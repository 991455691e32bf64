"""Scoring against the model's own full forward and generation; statistics against known values."""

from __future__ import annotations

import csv

import pytest
import torch

from recipes.build import build
from recipes.evaluation import packed, scoring
from recipes.evaluation.packed import can_pack, pack, packed_attention
from recipes.evaluation.questions import Question, prompt_of, stratified
from recipes.evaluation.results import (
    SEED_COLUMNS,
    compare,
    summarise,
    write_rich_csv,
    write_seed_csv,
)
from recipes.evaluation.scoring import Answer, Prompt, generate_answers, score_options
from recipes.evaluation.statistics import above_chance, mcnemar_exact, wilson_interval
from recipes.layers import decoder_layers
from recipes.lean import LeanStep
from tests.recipes.tiny import tiny_chameleon, tiny_llama, tiny_qwen3, tiny_spec

LETTER_IDS = [210, 211, 212, 213]


def _model(maker):
    built = build(tiny_spec(), config=maker(), device="cpu", seed=1)
    return built.base.eval()


def _prompts(count: int, low: int = 101, high: int = 300) -> list[Prompt]:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(3, 20, (count,), generator=generator).tolist()
    return [
        Prompt(tuple(torch.randint(low, high, (n,), generator=generator).tolist())) for n in lengths
    ]


@pytest.mark.parametrize("maker", [tiny_chameleon, tiny_llama, tiny_qwen3])
@pytest.mark.parametrize("prefix", [(), (150, 151, 152, 153)])
@pytest.mark.parametrize("at_once", [1, 64, None])
@pytest.mark.parametrize("way", ["packed", "packed through the interface", "padded"])
def test_scores_equal_each_prompts_own_forward(maker, prefix, at_once, way, monkeypatch) -> None:
    if way == "padded":  # as for a model with a soft cap in its attention
        monkeypatch.setattr(scoring, "can_pack", lambda base, longest: False)
    if way == "packed through the interface":  # as for layers of another layout
        monkeypatch.setattr(packed, "is_known", lambda layer: False)
    model, prompts = _model(maker), _prompts(9)
    answers = score_options(model, prefix, prompts, LETTER_IDS, tokens_at_once=at_once)
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = torch.tensor([[*prefix, *prompt.ids]])
        with torch.no_grad():
            own = torch.log_softmax(model(input_ids=ids).logits[0, -1].float(), -1)[LETTER_IDS]
        assert answer.log_probabilities == pytest.approx(own.tolist(), abs=1e-4)
        assert answer.index == int(own.argmax())


def test_packed_questions_do_not_see_each_other_under_grouped_heads() -> None:
    model = _model(lambda: tiny_llama(num_key_value_heads=1))
    alone = [score_options(model, (150, 151), [p], LETTER_IDS)[0] for p in _prompts(5)]
    together = score_options(model, (150, 151), _prompts(5), LETTER_IDS)
    for a, b in zip(alone, together, strict=True):
        assert a.log_probabilities == pytest.approx(b.log_probabilities, abs=1e-4)


def test_only_plain_attention_is_packed() -> None:
    model = _model(tiny_llama)
    assert can_pack(model, 1000)
    model.config.sliding_window = 64
    assert can_pack(model, 64)
    assert not can_pack(model, 65)
    model.config.sliding_window, model.config.attn_logit_softcapping = None, 50.0
    assert not can_pack(model, 1)


def test_a_layer_outside_the_attention_interface_is_told() -> None:
    model = _model(tiny_llama)
    few = pack((), [(1, 2, 3)], {}, torch.device("cpu"))
    with pytest.raises(RuntimeError, match="0 of 2 layers"), packed_attention(model, few):
        pass


def test_layers_have_their_own_forward_again() -> None:
    """Plain ones, and ones that the lean step has replaced, adapters trained."""
    spec = tiny_spec(stack="lean")
    built = build(spec, config=tiny_chameleon(), device="cpu", seed=1)
    prompts = _prompts(4)
    before = score_options(built.base.eval(), (150,), prompts, LETTER_IDS)
    assert all("forward" not in layer.__dict__ for layer in decoder_layers(built.base))
    step = LeanStep(built, spec)
    replaced = [layer.forward for layer in decoder_layers(built.base)]
    after = score_options(built.base.eval(), (150,), prompts, LETTER_IDS)
    assert [layer.forward for layer in decoder_layers(step.base)] == replaced
    for a, b in zip(before, after, strict=True):
        assert a.log_probabilities == pytest.approx(b.log_probabilities, abs=1e-4)


def test_scoring_agrees_with_greedy_generation_where_that_gives_a_letter() -> None:
    model, prompts = _model(tiny_llama), _prompts(20)
    with torch.no_grad():
        model.lm_head.weight[LETTER_IDS[0] : LETTER_IDS[3] + 1] *= 40

    class Letters:
        def decode(self, ids):
            return dict(zip(LETTER_IDS, "ABCD", strict=True)).get(ids[0], "?")

    scored = score_options(model, (150, 151), prompts, LETTER_IDS)
    greedy = generate_answers(model, Letters(), (150, 151), prompts, beams=1)
    given = [(s.text, g.text) for s, g in zip(scored, greedy, strict=True) if g.index is not None]
    assert len(given) > 5
    assert all(a == b for a, b in given)
    assert len(generate_answers(model, Letters(), (150, 151), prompts[:2], beams=5)) == 2


def test_wilson_equals_published_values() -> None:
    # Newcombe 1998, table I: 81 of 263 and 15 of 148, score method.
    assert wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson_interval(15, 148) == pytest.approx((0.0624, 0.1605), abs=5e-5)
    assert wilson_interval(0, 20)[0] == 0


def test_mcnemar_equals_scipys_binomial_values() -> None:
    first = [True] * 2 + [False] * 10 + [True] * 5
    second = [False] * 2 + [True] * 10 + [True] * 5
    assert mcnemar_exact(first, second) == pytest.approx(0.03857421875)  # binomtest(2, 12)
    assert mcnemar_exact([True], [True]) == 1
    assert above_chance(21, 100) == pytest.approx(0.8512, abs=2e-4)  # binom.sf(20, 100, 0.25)


def _questions() -> list[Question]:
    subjects = ["algebra"] * 60 + ["física"] * 30 + ["arte"] * 10
    return [
        Question(f"¿{i}?", ("a", "b", "c", "d"), i % 4, subject)
        for i, subject in enumerate(subjects)
    ]


def test_stratified_keeps_shares_and_repeats_by_seed() -> None:
    chosen = stratified(_questions(), 20, seed=3)
    counts = [sum(q.subject == s for q in chosen) for s in ("algebra", "física", "arte")]
    assert counts == [12, 6, 2]
    assert chosen == stratified(_questions(), 20, seed=3)
    assert chosen != stratified(_questions(), 20, seed=4)
    assert len(stratified(_questions(), 1000)) == 100


def test_summary_counts_invalid_as_wrong() -> None:
    questions = _questions()[:4]
    answers = [
        Answer("A", 0, None, 1.0),
        Answer("La", None, None, 2.0),
        *[Answer("A", 0, None, 3.0)] * 2,
    ]
    summary = summarise(questions, answers)
    assert (summary.right, summary.invalid, summary.accuracy) == (1, 1, 0.25)
    assert summary.mean_seconds == 2.25
    assert compare(questions, answers, answers) == 1


def test_csv_has_exactly_the_seeds_columns(tmp_path) -> None:
    questions = _questions()[:2]
    answers = [Answer("A", 0, (-0.1, -1.0, -2.0, -3.0), 0.5), Answer("La", None, None, 0.25)]
    write_seed_csv(tmp_path / "seed.csv", questions, answers)
    with (tmp_path / "seed.csv").open(encoding="utf-8") as file:
        rows = list(csv.reader(file))
    assert rows[0] == list(SEED_COLUMNS)
    assert rows[1] == ["¿0?", "A", "A", "True", "0.5"]
    assert rows[2] == ["¿1?", "La", "B", "False", "0.25"]
    write_rich_csv(tmp_path / "rich.csv", questions, answers, "tuned")
    with (tmp_path / "rich.csv").open(encoding="utf-8") as file:
        rich = list(csv.DictReader(file))
    assert rich[0]["Log P(A)"] == "-0.1"
    assert rich[1]["Is Valid"] == "False"


def test_prompt_holds_the_options_and_ends_with_the_ask() -> None:
    text = prompt_of(_questions()[0])
    assert "A. a\nB. b\nC. c\nD. d" in text
    assert text.endswith("Letra:")
