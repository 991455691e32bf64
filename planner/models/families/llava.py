"""LLaVA 1.5: a CLIP tower, a two-layer projector, and a LLaMA decoder (or another text family)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from planner.models.decoder import DecoderGeometry, head_module, linear, stack_modules
from planner.models.families import llama, mistral, qwen2
from planner.models.reading import Reader
from planner.models.towers import TowerGeometry, read_tower, tower_modules
from planner.models.tree import Module

MODEL_TYPES = ("llava",)
AUTO_CLASS = "AutoModelForImageTextToText"
TEXT_FAMILIES = {"llama": llama, "mistral": mistral, "qwen2": qwen2}
# LlavaConfig's tower where config.json gives none: CLIP ViT-L/14 at 336 pixels.
DEFAULT_TOWER = {
    "intermediate_size": 4096, "hidden_size": 1024, "patch_size": 14, "image_size": 336,
    "num_hidden_layers": 24, "num_attention_heads": 16,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class LlavaGeometry:
    """feature_layers: the tower's hidden states that feed the projector; class_feature: its class
    token is kept (strategy "full"); tied: lm_head shares the embedding."""

    text: DecoderGeometry
    vision: TowerGeometry
    feature_layers: tuple[int, ...]
    class_feature: bool
    projector_hidden_act: str
    projector_bias: bool
    tied: bool


def geometry(config: Mapping[str, Any]) -> LlavaGeometry:
    """The geometry that config.json describes; InputError names every bad key."""
    reader = Reader(config)
    read = read_llava(reader)
    reader.check()
    return read


def read_llava(reader: Reader, tie_follows_text: bool = True) -> LlavaGeometry:
    """The keys that LLaVA 1.5 and 1.6 share; problems are noted in the reader."""
    inner = reader.inner("text_config")
    model_type = inner.text("model_type", "llama")
    if model_type not in TEXT_FAMILIES:
        inner.reject(
            "model_type", "is not a known text model", model_type, ", ".join(TEXT_FAMILIES)
        )
        model_type = "llama"
    text = TEXT_FAMILIES[model_type].decoder(inner, nested=True)
    tied = reader.flag("tie_word_embeddings", False)
    return LlavaGeometry(
        text=text,
        vision=read_tower(reader.inner("vision_config", DEFAULT_TOWER), "clip_vision_model"),
        feature_layers=_feature_layers(reader),
        class_feature=reader.text("vision_feature_select_strategy", "default") == "full",
        projector_hidden_act=reader.text("projector_hidden_act", "gelu"),
        projector_bias=reader.flag("multimodal_projector_bias", True),
        tied=tied or (tie_follows_text and text.tie_word_embeddings),
    )


def _feature_layers(reader: Reader) -> tuple[int, ...]:
    value = reader.raw("vision_feature_layer", -2)
    layers = value if isinstance(value, list) else [value]
    if not layers or any(type(layer) is not int or abs(layer) > 4096 for layer in layers):
        reader.reject("vision_feature_layer", "is not a layer or a list of layers", value)
        return (-2,)
    return tuple(layers)


def modules(geometry: LlavaGeometry) -> Iterator[Module]:
    """Modules of `LlavaForConditionalGeneration`, in torch's order."""
    yield from tower_modules(geometry.vision, "model.vision_tower.")
    width, hidden = geometry.vision.hidden_size, geometry.text.hidden_size
    projector, bias = "model.multi_modal_projector.", geometry.projector_bias
    features = width * len(geometry.feature_layers)
    yield linear(f"{projector}linear_1", "projector", features, hidden, bias)
    yield linear(f"{projector}linear_2", "projector", hidden, hidden, bias)
    yield from stack_modules(geometry.text, "model.language_model.")
    yield head_module(geometry.text, "model.language_model.", geometry.tied)


def image_tokens(geometry: LlavaGeometry, image_size: int | None) -> int:
    """One a patch (576), whatever the size: the processor crops to the tower's resolution."""
    vision = geometry.vision
    return vision.patches + (vision.class_token and geometry.class_feature)


image_features = image_tokens
