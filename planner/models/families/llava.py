"""LLaVA 1.5: a CLIP tower, a two-layer projector, and a LLaMA decoder (or another text family)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from planner.memory import layers as nn
from planner.memory import vision
from planner.memory.loaded import Loaded
from planner.memory.ops import Engine
from planner.memory.step import Batch
from planner.memory.tensor import Tensor
from planner.models.causal import nested_decoder
from planner.models.decoder import DecoderGeometry, head_module, linear, stack_modules
from planner.models.decoder_step import Decoder
from planner.models.families import llama, mistral, qwen2
from planner.models.reading import Reader
from planner.models.towers import TowerGeometry, read_tower, tower_modules
from planner.models.tree import Module
from planner.models.vision_step import Tower, image_text_forward, tower_pixels

AUTO_CLASS = "AutoModelForImageTextToText"
_TEXT_FAMILIES = {"llama": llama.FAMILY, "mistral": mistral.FAMILY, "qwen2": qwen2.FAMILY}
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
    text = nested_decoder(reader.inner("text_config"), _TEXT_FAMILIES, "llama")
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


pixels = tower_pixels


def forward(t: Engine, loaded: Loaded, geometry: LlavaGeometry, batch: Batch) -> tuple[Any, ...]:
    """`LlavaForConditionalGeneration.forward`: loss, logits, the cache, image_hidden_states."""

    def features_of(images: Tensor) -> Tensor:
        projected = image_features_of(t, loaded, geometry, images, lambda x: x)
        return vision.rows_apart(t, projected)

    decoder = Decoder(t, loaded, geometry.text, "model.language_model.")
    return image_text_forward(decoder, batch, features_of)


def image_features_of(
    t: Engine, loaded: Loaded, geometry: LlavaGeometry, images: Tensor,
    pack: Callable[[Tensor], Tensor],
) -> Tensor:  # fmt: skip
    """get_image_features: every hidden state of the tower is held until it returns. `pack` is what
    it does with the projected features, (N, P, D)."""
    tower = Tower(t, loaded, geometry.vision, "model.vision_tower.")
    states = tower.hidden_states(images)
    _last, _pooled = tower.pooled(states[-1])
    chosen = [states[layer] for layer in geometry.feature_layers]
    if not geometry.class_feature:
        count, positions, width = chosen[0].shape
        chosen = [vision.narrow(t, state, (count, positions - 1, width)) for state in chosen]
    if len(chosen) > 1:
        joined = (*chosen[0].shape[:-1], chosen[0].shape[-1] * len(chosen))
        chosen = [t.cat(chosen, joined)]
    return pack(project(t, loaded, chosen[0], geometry.projector_hidden_act))


def project(t: Engine, loaded: Loaded, x: Tensor, activation: str) -> Tensor:
    """LlavaMultiModalProjector.forward."""
    path = "model.multi_modal_projector."
    hidden = nn.linear(t, loaded.linear(f"{path}linear_1"), x)
    with t.recorder.scope(f"{path}act"):
        hidden = vision.activation(t, activation, hidden)
    return nn.linear(t, loaded.linear(f"{path}linear_2"), hidden)
