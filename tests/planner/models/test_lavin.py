"""LaVIN in the planner: what trains, counted by torch on the recipe's model; what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from planner.errors import InputError, UnsupportedError
from planner.estimate import estimate
from planner.models.registry import load_model, model_from_config
from planner.report.text import settings_sentence
from planner.spec import spec_from_mapping
from tests.planner.models.conftest import meta_model

# Trained parameters that LaVIN's paper and README round to 3.8M and 5.4M.
PUBLISHED = {"lavin-7b": 3_781_296, "lavin-13b": 5_390_080}


@pytest.mark.parametrize(("name", "published"), PUBLISHED.items())
def test_default_run_trains_the_published_adapters(name: str, published: int) -> None:
    answer = estimate(spec_from_mapping({"model": name, "device": "a100-40gb"}))
    real = meta_model(load_model(name)).trained_parameters()
    assert answer.parameters.trainable == published == sum(p.numel() for p in real.values())
    assert "mixture-of-modality" in settings_sentence(answer)


@pytest.mark.parametrize(("name", "trainable"), [
    ("lavin-30b", 9_482_696), ("lavin-65b", 14_804_112),
])  # fmt: skip
def test_unpublished_sizes_answer_and_are_marked(name: str, trainable: int) -> None:
    """20 d + 10 an adapter, one a layer of the language model and of the tower; projector; 2 d."""
    answer = estimate(spec_from_mapping({"model": name, "device": "a100-80gb"}))
    assert answer.parameters.trainable == trainable
    assert any("could not be read" in note for note in answer.notes)


def test_a_picture_takes_six_tokens_and_more_memory() -> None:
    fields = {"model": "lavin-7b", "device": "a100-40gb", "gradient_checkpointing": True}
    text = estimate(spec_from_mapping(fields))
    pictured = estimate(spec_from_mapping({**fields, "images_per_sample": 1}))
    assert load_model("lavin-7b").image_tokens(500) == 6
    assert pictured.peak_allocated_bytes > text.peak_allocated_bytes


@pytest.mark.parametrize(("fields", "field"), [
    ({"method": "full", "quantization": "none"}, "method"),
    ({"lora": {"rank": 8}}, "lora"),
    ({"adapter": "adaption_prompt"}, "adapter"),
    ({"quantization": "int8"}, "quantization"),
    ({"stack": "lean"}, "stack"),
    ({"attention": "flash_attention_2"}, "attention"),
    ({"images_per_sample": 2}, "images_per_sample"),
])  # fmt: skip
def test_what_the_recipe_does_not_build_is_refused(fields: dict[str, Any], field: str) -> None:
    spec = spec_from_mapping({"model": "lavin-7b", "device": "a100-40gb", **fields})
    with pytest.raises((InputError, UnsupportedError), match=field):
        estimate(spec)


@pytest.mark.parametrize("change", [
    {"groups": 3}, {"text_adapters": "everywhere"},
    {"vision_config": {"model_type": "siglip_vision_model"}},
])  # fmt: skip
def test_a_config_that_cannot_be_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        model_from_config({**load_model("lavin-7b").config, **change}, "changed")
