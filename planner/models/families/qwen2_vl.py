"""Qwen2-VL: a vision transformer over native resolution, 2 x 2 patches merged into a token, and a
Qwen2 decoder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from math import ceil, floor, sqrt
from typing import Any, TypedDict

from planner.memory import vision as vision_ops
from planner.memory.loaded import Loaded
from planner.memory.ops import Engine
from planner.memory.step import Batch
from planner.memory.storage import Recorder
from planner.memory.tensor import Tensor
from planner.models.decoder import (
    DecoderGeometry,
    Defaults,
    head_module,
    late_windows,
    layer_norm,
    linear,
    read_decoder,
    stack_modules,
    weighted,
)
from planner.models.decoder_step import head_and_loss
from planner.models.images import image_input, needed_size
from planner.models.qwen_vision import PatchTower, QwenVlDecoder
from planner.models.reading import Reader
from planner.models.tree import Component, Module
from planner.models.vision_step import join
from planner.spec import RunSpec

AUTO_CLASS = "AutoModelForImageTextToText"
TEXT_DEFAULTS = Defaults(
    vocab_size=152_064, hidden_size=8192, intermediate_size=29_568, num_hidden_layers=80,
    num_attention_heads=64, num_key_value_heads=8, max_position_embeddings=32_768,
    rms_norm_eps=1e-5,
)  # fmt: skip
IMAGE_MARKS = 2  # <|vision_start|> and <|vision_end|>
_VISION: Component = "vision_tower"
# Qwen2VLImageProcessor's bounds (image_processing_qwen2_vl.py): pixels after resizing.
_LEAST_PIXELS, _MOST_PIXELS = 56 * 56, 28 * 28 * 1280


class PatchSizes(TypedDict):
    in_channels: int
    patch_size: int
    spatial_merge_size: int
    temporal_patch_size: int


@dataclass(frozen=True, slots=True)
class PatchVision:
    """What the towers of Qwen2-VL and 2.5-VL share. output_size: width of the merged tokens.

    rms: RMSNorm and a gated MLP (2.5) instead of LayerNorm and a plain one. window_size, in
    pixels, and full_attention_blocks: 2.5 attends within windows but in those blocks.
    """

    depth: int
    hidden_size: int
    intermediate_size: int
    output_size: int
    num_attention_heads: int
    in_channels: int
    patch_size: int
    spatial_merge_size: int
    temporal_patch_size: int
    hidden_act: str
    rms: bool = False
    window_size: int | None = None
    full_attention_blocks: tuple[int, ...] = ()

    @property
    def merged_size(self) -> int:
        """Width of the patches that become one token, side by side."""
        return self.hidden_size * self.spatial_merge_size**2


@dataclass(frozen=True, slots=True)
class QwenVlGeometry:
    """tied: lm_head shares the embedding."""

    text: DecoderGeometry
    vision: PatchVision
    tied: bool


def geometry(config: Mapping[str, Any]) -> QwenVlGeometry:
    """The geometry that config.json describes; InputError names every bad key."""
    reader = Reader(config)
    inner = reader.inner("vision_config")
    width = inner.size("embed_dim", 1280)
    vision = PatchVision(
        depth=inner.size("depth", 32, high=4096),
        hidden_size=width,
        intermediate_size=width * inner.size("mlp_ratio", 4, high=1024),
        output_size=inner.size("hidden_size", 3584),
        num_attention_heads=inner.size("num_heads", 16),
        hidden_act=inner.text("hidden_act", "quick_gelu"),
        **patch_sizes(inner),
    )
    read = QwenVlGeometry(read_text(reader, "qwen2_vl_text"), vision, read_tied(reader))
    reader.check()
    return read


def patch_sizes(reader: Reader) -> PatchSizes:
    """The patch keys of a `vision_config`."""
    return {
        "in_channels": reader.size("in_channels", 3),
        "patch_size": reader.square("patch_size", 14),
        "spatial_merge_size": reader.size("spatial_merge_size", 2, high=64),
        "temporal_patch_size": reader.size("temporal_patch_size", 2, high=64),
    }


def read_text(reader: Reader, model_type: str) -> DecoderGeometry:
    """The decoder, from `text_config` or, as the published files have it, from the top level."""
    nested = reader.has("text_config")
    source = reader.inner("text_config") if nested else reader
    text = read_decoder(source, model_type, TEXT_DEFAULTS, nested)
    text = replace(text, head_dim=max(text.hidden_size // text.num_attention_heads, 1))
    return replace(late_windows(source, text, 80), qkv_bias=True)


def read_tied(reader: Reader) -> bool:
    """A tie at the top level or in `text_config`."""
    inner = reader.inner("text_config")
    return reader.flag("tie_word_embeddings", False) or inner.flag("tie_word_embeddings", False)


def modules(geometry: QwenVlGeometry) -> Iterator[Module]:
    """Modules of `Qwen2VLForConditionalGeneration` (and of 2.5), in torch's order."""
    yield from _vision_modules(geometry.vision, "model.visual.")
    yield from stack_modules(geometry.text, "model.language_model.")
    yield head_module(geometry.text, "model.language_model.", geometry.tied)


def _vision_modules(vision: PatchVision, prefix: str) -> Iterator[Module]:
    width, patch = vision.hidden_size, vision.patch_size
    kernel = (vision.in_channels, vision.temporal_patch_size, patch, patch)
    yield weighted(f"{prefix}patch_embed.proj", "conv", _VISION, width, *kernel)
    for index in range(vision.depth):
        yield from _block_modules(vision, f"{prefix}blocks.{index}.")
    merged, merger = vision.merged_size, f"{prefix}merger."
    yield _norm(vision, f"{merger}ln_q")
    yield linear(f"{merger}mlp.0", "projector", merged, merged, bias=True)
    yield linear(f"{merger}mlp.2", "projector", merged, vision.output_size, bias=True)


def _block_modules(vision: PatchVision, prefix: str) -> Iterator[Module]:
    width, inner = vision.hidden_size, vision.intermediate_size
    yield _norm(vision, f"{prefix}norm1")
    yield _norm(vision, f"{prefix}norm2")
    yield linear(f"{prefix}attn.qkv", _VISION, width, 3 * width, bias=True)
    yield linear(f"{prefix}attn.proj", _VISION, width, width, bias=True)
    first, last = (("gate_proj", "up_proj"), "down_proj") if vision.rms else (("fc1",), "fc2")
    for name in first:
        yield linear(f"{prefix}mlp.{name}", _VISION, width, inner, bias=True)
    yield linear(f"{prefix}mlp.{last}", _VISION, inner, width, bias=True)


def _norm(vision: PatchVision, path: str) -> Module:
    component: Component = "projector" if path.endswith("ln_q") else _VISION
    if vision.rms:
        return weighted(path, "norm", component, vision.hidden_size)
    return layer_norm(path, component, vision.hidden_size)


def patch_grid(geometry: QwenVlGeometry, image_size: int | None) -> tuple[int, int]:
    """Rows and columns of patches of a square image, as the processor resizes it (still image:
    one temporal patch)."""
    edge = needed_size(geometry.text.model_type.removesuffix("_text"), image_size)
    factor = geometry.vision.patch_size * geometry.vision.spatial_merge_size
    resized = _smart_resize(edge, factor)
    patches = resized // geometry.vision.patch_size
    return patches, patches


def _smart_resize(edge: int, factor: int) -> int:
    """Qwen's rule for a square: a multiple of `factor`, its area between the two bounds."""
    resized = round(edge / factor) * factor
    if resized**2 > _MOST_PIXELS:
        return max(factor, floor(edge / sqrt(edge**2 / _MOST_PIXELS) / factor) * factor)
    if resized**2 < _LEAST_PIXELS:
        return ceil(edge * sqrt(_LEAST_PIXELS / edge**2) / factor) * factor
    return resized


def image_features(geometry: QwenVlGeometry, image_size: int | None) -> int:
    rows, columns = patch_grid(geometry, image_size)
    return rows * columns // geometry.vision.spatial_merge_size**2


def image_tokens(geometry: QwenVlGeometry, image_size: int | None) -> int:
    """Merged patches and two marks, by the size of the image."""
    return image_features(geometry, image_size) + IMAGE_MARKS


def pixels(recorder: Recorder, geometry: QwenVlGeometry, spec: RunSpec) -> Tensor:
    """pixel_values: a row a patch, (patches of all images, channels · frames · pixels) fp32."""
    vision = geometry.vision
    rows, columns = patch_grid(geometry, spec.image_size)
    patches = spec.micro_batch_size * spec.images_per_sample * rows * columns
    width = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    return image_input(recorder, (patches, width))


def forward(t: Engine, loaded: Loaded, geometry: QwenVlGeometry, batch: Batch) -> tuple[Any, ...]:
    """`Qwen2VLForConditionalGeneration.forward` (and 2.5's): loss, logits, the cache."""
    decoder = QwenVlDecoder(t, loaded, geometry.text, "model.language_model.")
    embeds = decoder.embed(batch.ids)
    features = None
    if batch.pixels is not None:
        features = _image_features(t, loaded, geometry, batch)
        features = t.to(features, embeds.dtype)
        embeds = join(t, embeds, batch.ids, features)
    hidden = decoder.layers(embeds)
    del embeds, features
    loss, logits = head_and_loss(t, loaded, geometry.text, hidden, batch.labels)
    return loss, logits, decoder.cache


def _image_features(t: Engine, loaded: Loaded, geometry: QwenVlGeometry, batch: Batch) -> Tensor:
    """get_image_features, and the cat of what it split by image."""
    assert batch.pixels is not None
    images = batch.ids.shape[0] * loaded.spec.images_per_sample
    grid = patch_grid(geometry, loaded.spec.image_size)
    weight = loaded.parameter("model.visual.patch_embed.proj")
    pixel_values = t.to(batch.pixels, weight.dtype)
    tower = PatchTower(t, loaded, geometry.vision, "model.visual.", images, grid)
    merged = tower(pixel_values)
    del pixel_values
    return vision_ops.rows_apart(t, merged)
