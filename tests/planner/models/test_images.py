"""Tokens an image takes, against transformers' own processors and modelling code."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from transformers.models.llava_next.processing_llava_next import LlavaNextProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from planner.errors import InputError
from planner.models.registry import Model, load_model, model_from_config
from tests.planner.models.conftest import meta_model

SIZES = (14, 100, 224, 335, 336, 337, 448, 500, 672, 1000, 1344, 2048, 4000)


def shallow(name: str) -> Model:
    """The catalogue's model with one decoder layer: images never see the others."""
    config = dict(load_model(name).config)
    if "text_config" in config:
        config["text_config"] = {**config["text_config"], "num_hidden_layers": 1}
    else:
        config["num_hidden_layers"] = 1
    return model_from_config(config, name)


def features(model: Model, images: torch.Tensor) -> int:
    """Rows of `get_image_features` of the real model, for one image, on the meta device."""
    real = meta_model(model).model
    with torch.no_grad():
        found = real.get_image_features(pixel_values=images.to(real.dtype))
    found = getattr(found, "pooler_output", found)
    rows = found if isinstance(found, torch.Tensor) else torch.cat(list(found))
    return rows.flatten(0, -2).shape[0]


def pixels(*shape: int) -> torch.Tensor:
    return torch.zeros(*shape, device="meta", dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("name", "edge", "total"),
    [
        ("llava-1.5-7b", 336, 576),
        ("paligemma-3b", 224, 256),
        ("gemma-3-4b", 896, 260),
    ],
)
def test_fixed_sizes_are_what_the_model_makes(name: str, edge: int, total: int) -> None:
    model = shallow(name)
    expected = features(model, pixels(1, 3, edge, edge))
    assert model.family.image_features(model.geometry, None) == expected
    assert model.image_tokens() == total


def test_chameleon_makes_1024_codes_and_two_marks() -> None:
    model = shallow("chameleon-7b")
    with torch.no_grad():
        encoded = meta_model(model).model.vqmodel.encode(pixels(1, 3, 512, 512))
    assert encoded.image_tokens.numel() == model.family.image_features(model.geometry, None)
    assert model.image_tokens() == 1026


@pytest.mark.parametrize("edge", SIZES)
def test_llava_next_counts_as_its_processor(edge: int) -> None:
    model = load_model("llava-1.6-mistral-7b")
    processor = SimpleNamespace(
        image_processor=SimpleNamespace(image_grid_pinpoints=model.config["image_grid_pinpoints"]),
        patch_size=14,
        num_additional_image_tokens=1,
        _get_unpadded_features=lambda *a: LlavaNextProcessor._get_unpadded_features(processor, *a),
    )
    counted = LlavaNextProcessor._get_number_of_features(processor, edge, edge, 336, 336)
    assert model.image_tokens(edge) == counted - 1  # strategy "default" drops the class token


@pytest.mark.parametrize("edge", SIZES)
@pytest.mark.parametrize("name", ["qwen2-vl-2b", "qwen2.5-vl-7b"])
def test_qwen_counts_as_its_processor(name: str, edge: int) -> None:
    height, width = smart_resize(edge, edge, 28)
    model = load_model(name)
    assert model.family.image_features(model.geometry, edge) == (height // 28) * (width // 28)
    assert model.image_tokens(edge) == (height // 28) * (width // 28) + 2


def test_text_models_take_no_images() -> None:
    with pytest.raises(InputError, match="llama models take no images"):
        load_model("llama-3.2-1b").image_tokens(336)


def test_a_size_is_asked_for_where_tokens_depend_on_it() -> None:
    with pytest.raises(InputError, match="image_size: is needed: a qwen2_vl model"):
        load_model("qwen2-vl-2b").image_tokens()
