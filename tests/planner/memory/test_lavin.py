"""LaVIN's shadow program against the recipe's own model and step: peaks of forward and backward,
and all that is allocated on the way, in order."""

from __future__ import annotations

import dataclasses
from difflib import SequenceMatcher
from functools import lru_cache
from typing import Any

import pytest
from bitsandbytes.autograd._functions import MatMul4Bit

from planner.models.registry import load_model, model_from_config
from planner.spec import spec_from_mapping
from recipes.lavin.config import LavinConfig, Placement, lavin_config
from tests.planner.memory.lavin_trace import trace_lavin
from tests.planner.memory.referee import (
    planned_allocated,
    planned_peaks,
    shadow,
    traced_allocated,
    traced_peaks,
)
from tests.planner.memory.test_order import planned_steps, traced_steps

TOLERANCE = 1e-3
FLOOR_BYTES = 1 << 20
LAYERS, VISION_LAYERS = 2, 8  # full width; the tower gives two visual tokens
WIDE = {"quantization": "none"}

CASES: list[dict[str, Any]] = [
    {},
    {"images_per_sample": 1},
    {"images_per_sample": 1, "double_quant": False, "gradient_accumulation_steps": 2},
    {"images_per_sample": 1, "micro_batch_size": 4, **WIDE},
    {"images_per_sample": 1, "micro_batch_size": 4, "gradient_checkpointing": True},
    {"images_per_sample": 1, "attention": "eager", **WIDE},
    {"images_per_sample": 1, "attention": "eager", "precision": "fp16", "weights_dtype": "float16",
     "gradient_checkpointing": True, "micro_batch_size": 2},
    {"images_per_sample": 1, "precision": "fp32", "weights_dtype": "float32", **WIDE},
    {"images_per_sample": 1, "micro_batch_size": 2, "sequence_length": 203, **WIDE},
    {"images_per_sample": 1, "text_adapters": "both", "vision_adapters": "mlp"},
]  # fmt: skip


@lru_cache(maxsize=1)
def _both_of(number: int) -> tuple[Any, Any]:
    case = CASES[number]
    fields = {"micro_batch_size": 1, "sequence_length": 512, **case}
    places = {key: fields.pop(key) for key in ("text_adapters", "vision_adapters") if key in case}
    spec = spec_from_mapping({"model": "lavin-7b", **fields})
    return trace_lavin(spec, _recipe(places)), shadow(spec, _planner(places))


def _recipe(places: dict[str, Any]) -> LavinConfig:
    config = lavin_config("7b")
    config.text.num_hidden_layers = LAYERS
    config.vision.num_hidden_layers = VISION_LAYERS
    return dataclasses.replace(config, **{key: Placement(where) for key, where in places.items()})


def _planner(places: dict[str, Any]) -> Any:
    config = {**load_model("lavin-7b").config, **places}
    config["text_config"] = {**config["text_config"], "num_hidden_layers": LAYERS}
    config["vision_config"] = {**config["vision_config"], "num_hidden_layers": VISION_LAYERS}
    return model_from_config(config, "lavin-7b")


@pytest.mark.parametrize("number", range(len(CASES)), ids=[str(case) for case in CASES])
def test_peaks_and_allocations_are_those_of_the_recipe(number: int) -> None:
    traced, planned = _both_of(number)
    assert planned.resident_bytes == pytest.approx(traced.resident_bytes, rel=TOLERANCE)
    expected, found = traced_peaks(traced), planned_peaks(planned)
    assert found["forward"] == pytest.approx(expected["forward"], rel=TOLERANCE)
    assert found["backward"] == pytest.approx(expected["backward"], rel=TOLERANCE)
    all_traced = traced_allocated(traced, FLOOR_BYTES)
    assert planned_allocated(planned, FLOOR_BYTES) == pytest.approx(all_traced, rel=TOLERANCE)


@pytest.mark.parametrize("number", range(len(CASES)), ids=[str(case) for case in CASES])
def test_large_allocations_come_in_the_recipe_s_order(number: int) -> None:
    traced, planned = _both_of(number)
    expected, found = traced_steps(traced), planned_steps(planned)
    assert len(expected) > 100
    matcher = SequenceMatcher(None, expected, found, autojunk=False)
    differing = [code for code in matcher.get_opcodes() if code[0] != "equal"]
    # pictures are sent inside the forward, which the trace does not tell from a temporary: two;
    # eager attention in fp16 drops a mask's copy one statement apart
    pictures = 2 * (CASES[number].get("micro_batch_size", 1) > 1)
    eager_in_fp16 = 16 * (CASES[number].get("precision") == "fp16")
    assert len(differing) <= pictures + eager_in_fp16, differing[:5]


def test_old_bitsandbytes_kept_inputs_as_a_custom_function_that_keeps_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Before 0.43.2, MatMul4Bit.forward held its input on ctx (bitsandbytes pull request 1270)."""
    today = MatMul4Bit.forward

    def forward(ctx: Any, a: Any, *rest: Any) -> Any:
        out = today(ctx, a, *rest)
        ctx.kept = a
        return out

    fields = {"micro_batch_size": 2, "images_per_sample": 1, "model": "lavin-7b"}
    known = shadow(spec_from_mapping(fields), _planner({}))
    spec = spec_from_mapping({**fields, "versions": {"bitsandbytes": "0.39.0"}})
    monkeypatch.setattr(MatMul4Bit, "forward", staticmethod(forward))
    expected = traced_peaks(trace_lavin(spec, _recipe({})))
    found = planned_peaks(shadow(spec, _planner({})))
    assert found["forward"] == pytest.approx(expected["forward"], rel=TOLERANCE)
    assert found["backward"] == pytest.approx(expected["backward"], rel=TOLERANCE)
    assert found["backward"] > 1.03 * planned_peaks(known)["backward"]
