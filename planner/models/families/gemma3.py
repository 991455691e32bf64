"""Gemma 3 with images: a SigLIP tower, pooled to 256 tokens an image, and a Gemma 3 decoder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from math import isqrt
from typing import Any

from planner.memory import layers as nn
from planner.memory import norms
from planner.memory import vision as vision_ops
from planner.memory.loaded import Loaded
from planner.memory.ops import Engine
from planner.memory.step import Batch
from planner.memory.tensor import Tensor
from planner.models.decoder import DecoderGeometry, head_module, stack_modules, weighted
from planner.models.decoder_step import Decoder
from planner.models.families import gemma3_text
from planner.models.reading import Reader
from planner.models.towers import TowerGeometry, read_tower, tower_modules
from planner.models.tree import Module
from planner.models.vision_step import Tower, image_text_forward, tower_pixels

AUTO_CLASS = "AutoModelForImageTextToText"
# "\n\n", start, ..., end, "\n\n" (processing_gemma3.py); each is one token of Gemma's tokenizer.
IMAGE_MARKS = 4


@dataclass(frozen=True, slots=True)
class Gemma3Geometry:
    """tokens_per_image: after pooling; tied: lm_head shares the embedding."""

    text: DecoderGeometry
    vision: TowerGeometry
    tokens_per_image: int
    tied: bool

    @property
    def pool_kernel(self) -> int:
        """Edge, in patches, of the square that becomes one token."""
        patches = self.vision.image_size // self.vision.patch_size
        return max(patches // isqrt(self.tokens_per_image), 1)


def geometry(config: Mapping[str, Any]) -> Gemma3Geometry:
    """The geometry that config.json describes; InputError names every bad key."""
    reader = Reader(config)
    read = Gemma3Geometry(
        text=gemma3_text.FAMILY.decoder(reader.inner("text_config"), nested=True),
        vision=read_tower(reader.inner("vision_config"), "siglip_vision_model"),
        tokens_per_image=reader.size("mm_tokens_per_image", 256),
        tied=reader.flag("tie_word_embeddings", True),
    )
    reader.check()
    return read


def modules(geometry: Gemma3Geometry) -> Iterator[Module]:
    """Modules of `Gemma3ForConditionalGeneration`, in torch's order."""
    yield from tower_modules(geometry.vision, "model.vision_tower.")
    width, hidden = geometry.vision.hidden_size, geometry.text.hidden_size
    projector = "model.multi_modal_projector"
    shapes = (("mm_input_projection_weight", (width, hidden)),)
    yield Module(projector, "other", "projector", shapes)
    yield weighted(f"{projector}.mm_soft_emb_norm", "norm", "projector", width)
    yield from stack_modules(geometry.text, "model.language_model.")
    yield head_module(geometry.text, "model.language_model.", geometry.tied)


def image_tokens(geometry: Gemma3Geometry, image_size: int | None) -> int:
    """256 and four marks, whatever the size (without pan-and-scan, the processor's default)."""
    return geometry.tokens_per_image + IMAGE_MARKS


def image_features(geometry: Gemma3Geometry, image_size: int | None) -> int:
    return geometry.tokens_per_image


pixels = tower_pixels


def forward(t: Engine, loaded: Loaded, geometry: Gemma3Geometry, batch: Batch) -> tuple[Any, ...]:
    """`Gemma3ForConditionalGeneration.forward` without token_type_ids: loss, logits, the cache,
    image_hidden_states. No soft cap on the logits: that is the text class's."""

    def features_of(images: Tensor) -> Tensor:
        tower = Tower(t, loaded, geometry.vision, "model.vision_tower.")
        return _project(t, loaded, geometry, tower.last_hidden_state(images))

    text = replace(geometry.text, final_logit_softcapping=None)
    decoder = Decoder(t, loaded, text, "model.language_model.")
    return image_text_forward(decoder, batch, features_of)


def _project(t: Engine, loaded: Loaded, geometry: Gemma3Geometry, last: Tensor) -> Tensor:
    """Gemma3MultiModalProjector.forward: pooled to mm_tokens_per_image, normed, projected."""
    path, source = "model.multi_modal_projector", last.dtype
    images, _patches, width = last.shape
    edge = isqrt(geometry.tokens_per_image)
    with t.recorder.scope(path):
        maps = t.contiguous(t.transpose(last, 1, 2))
        pooled = vision_ops.average_pool(t, maps, (images, width, edge, edge))
        pooled = t.transpose(t.alias(pooled, (images, width, edge * edge), True), 1, 2)
    norm = f"{path}.mm_soft_emb_norm"
    with t.recorder.scope(norm):
        normed = norms.gemma_rms_norm(t, loaded.parameter(norm), pooled)
    with t.recorder.scope(path):
        weight = loaded.parameter(path, "mm_input_projection_weight")
        rows = t.contiguous(t.lower(normed))
        projected = nn.matmul(t, rows, t.transpose(weight, 0, 1))
        return t.to(projected, source, "type_as")
