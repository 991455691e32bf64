"""Levers: each one change, its figures those of `fit` on the changed spec."""

from __future__ import annotations

import pytest

import planner.levers
from planner.arguments import parse_arguments
from planner.estimate import estimate
from planner.levers import _is_useful, _order, _weigh, apply, changes, cheapest, levers
from planner.memory import program
from planner.spec import RunSpec
from tests.planner.tiny import tiny_spec

SPECS: list[dict[str, object]] = [
    {"micro_batch_size": 8, "sequence_length": 512, "device_memory": "1GiB"},
    {"method": "full", "quantization": "none", "optimizer": "adamw_torch", "micro_batch_size": 3},
    {"gradient_checkpointing": True, "gradient_accumulation_steps": 8, "precision": "fp16"},
    {"attention": "eager", "weights_dtype": "float32", "quantization": "none"},
]


@pytest.mark.parametrize("fields", SPECS)
def test_levers_equal_fit_on_the_changed_spec(tiny: str, fields: dict[str, object]) -> None:
    base = estimate(tiny_spec(tiny, **fields))
    found = levers(base)
    assert len(found) >= 4
    for lever in found:
        answer = estimate(lever.spec)
        assert lever.device_required_bytes == answer.device_required_bytes
        assert lever.saved_bytes == base.device_required_bytes - answer.device_required_bytes
        assert lever.verdict == answer.verdict
        assert lever.step_seconds == answer.step_seconds


@pytest.mark.parametrize("fields", SPECS)
def test_lever_flags_are_what_fit_takes(tiny: str, fields: dict[str, object]) -> None:
    spec = tiny_spec(tiny, **fields)
    for change in changes(spec):
        given = parse_arguments("fit", [tiny, *change.flags.split(" ")])
        assert not given.problems
        parsed = given.run_spec()
        for name in change.fields:
            assert _get(parsed, name) == _get(apply(spec, change.fields), name)


def test_smaller_batches_keep_the_effective_batch(tiny: str) -> None:
    spec = tiny_spec(tiny, micro_batch_size=8, gradient_accumulation_steps=4)
    batches = [change for change in changes(spec) if "micro_batch_size" in change.fields]
    assert len(batches) >= 2
    for change in batches:
        changed = apply(spec, change.fields)
        assert changed.micro_batch_size * changed.gradient_accumulation_steps == 32


def test_what_makes_it_fit_stands_first(tiny: str) -> None:
    spec = tiny_spec(tiny, micro_batch_size=32, sequence_length=1024, device_memory="1.5GiB")
    answer = estimate(spec)
    assert answer.verdict == "does_not_fit"
    shown = cheapest(answer)
    assert shown[0].verdict == "fits"
    rank = {"fits": 0, "tight": 1, "does_not_fit": 2}
    ranks = [rank[lever.verdict] for lever in shown]
    assert ranks == sorted(ranks)
    assert all(lever.saved_bytes > 0 for lever in shown)


def _get(spec: RunSpec, dotted: str) -> object:
    value: object = spec
    for part in dotted.split("."):
        value = getattr(value, part)
    return value


@pytest.mark.parametrize("memory", ["0.4GiB", "0.6GiB", "0.8GiB", "1GiB", "1.2GiB", "8GiB"])
@pytest.mark.parametrize("fields", SPECS)
def test_what_is_not_weighed_could_not_have_been_shown(
    tiny: str, fields: dict[str, object], memory: str
) -> None:
    answer = estimate(tiny_spec(tiny, **{**fields, "device_memory": memory}))
    outlines = sorted(
        planner.levers._outlines(answer),
        key=lambda outline: _order(answer, outline.verdict, outline),
    )
    chosen = [o for o in outlines if _is_useful(answer, o, o.verdict) or not o.saved_bytes]
    for most in (1, 3, 6):
        weighed = [_weigh(answer, outline) for outline in chosen[: most + planner.levers._SPARE]]
        useful = [lever for lever in weighed if _is_useful(answer, lever, lever.verdict)]
        best = sorted(useful, key=lambda lever: _order(answer, lever.verdict, lever))[:most]
        assert cheapest(answer, most) == best


@pytest.mark.parametrize("fields", SPECS)
def test_a_remembered_forward_and_backward_changes_no_answer(
    tiny: str, fields: dict[str, object]
) -> None:
    spec = tiny_spec(tiny, **fields)
    others = [apply(spec, {"optimizer": name}) for name in ("sgd", "adamw_torch", "lion_8bit")]
    program._gradients.clear()
    together = [estimate(other) for other in (*others, *others)]
    for answer, other in zip(together, (*others, *others), strict=True):
        program._gradients.clear()
        assert answer == estimate(other)
