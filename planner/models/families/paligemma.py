"""PaliGemma (1 and 2): a SigLIP tower, one linear projector, and a Gemma (or Gemma 2) decoder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from planner.memory import layers as nn
from planner.memory.loaded import Loaded
from planner.memory.ops import Engine
from planner.memory.step import Batch
from planner.memory.tensor import Tensor
from planner.models.causal import nested_decoder
from planner.models.decoder import DecoderGeometry, head_module, linear, stack_modules
from planner.models.decoder_step import Decoder
from planner.models.families import gemma, gemma2
from planner.models.reading import Reader
from planner.models.towers import TowerGeometry, read_tower, tower_modules
from planner.models.tree import Module
from planner.models.vision_step import Tower, image_text_forward, tower_pixels

AUTO_CLASS = "AutoModelForImageTextToText"
_TEXT_FAMILIES = {"gemma": gemma.FAMILY, "gemma2": gemma2.FAMILY}
# PaliGemmaConfig's own parts where config.json gives none.
_DEFAULT_TOWER = {
    "intermediate_size": 4096, "hidden_size": 1152, "patch_size": 14, "image_size": 224,
    "num_hidden_layers": 27, "num_attention_heads": 16, "vision_use_head": False,
}  # fmt: skip
_DEFAULT_TEXT = {
    "hidden_size": 2048, "num_hidden_layers": 18, "intermediate_size": 16_384,
    "num_attention_heads": 8, "num_key_value_heads": 1, "vocab_size": 257_152,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class PaliGemmaGeometry:
    """projection_dim: what the projector makes of a patch; tied: lm_head shares the embedding."""

    text: DecoderGeometry
    vision: TowerGeometry
    projection_dim: int
    tied: bool


def geometry(config: Mapping[str, Any]) -> PaliGemmaGeometry:
    """The geometry that config.json describes; InputError names every bad key."""
    reader = Reader(config)
    inner = reader.inner("text_config", _DEFAULT_TEXT)
    text = nested_decoder(inner, _TEXT_FAMILIES, "gemma")
    # The prefix, image and prompt, is seen whole unless the config says otherwise.
    bidirectional = inner.flag("use_bidirectional_attention", True)
    read = PaliGemmaGeometry(
        text=replace(text, bidirectional=bidirectional),
        vision=read_tower(reader.inner("vision_config", _DEFAULT_TOWER), "siglip_vision_model"),
        projection_dim=reader.size("projection_dim", 2048),
        tied=reader.flag("tie_word_embeddings", True),
    )
    reader.check()
    return read


def modules(geometry: PaliGemmaGeometry) -> Iterator[Module]:
    """Modules of `PaliGemmaForConditionalGeneration`, in torch's order."""
    yield from tower_modules(geometry.vision, "model.vision_tower.")
    width = geometry.vision.hidden_size
    projector = "model.multi_modal_projector.linear"
    yield linear(projector, "projector", width, geometry.projection_dim, bias=True)
    yield from stack_modules(geometry.text, "model.language_model.")
    yield head_module(geometry.text, "model.language_model.", geometry.tied)


def image_tokens(geometry: PaliGemmaGeometry, image_size: int | None) -> int:
    """One a patch (256 at 224 pixels), whatever the size: the processor resizes to one."""
    return geometry.vision.patches


image_features = image_tokens


pixels = tower_pixels


def forward(
    t: Engine, loaded: Loaded, geometry: PaliGemmaGeometry, batch: Batch
) -> tuple[Any, ...]:
    """`PaliGemmaForConditionalGeneration.forward` without token_type_ids: loss, logits, the cache,
    image_hidden_states."""

    def features_of(images: Tensor) -> Tensor:
        tower = Tower(t, loaded, geometry.vision, "model.vision_tower.")
        last = tower.last_hidden_state(images)
        return nn.linear(t, loaded.linear("model.multi_modal_projector.linear"), last)

    text = replace(geometry.text, final_logit_softcapping=None)
    decoder = Decoder(t, loaded, text, "model.language_model.")
    return image_text_forward(decoder, batch, features_of)
