"""CLIP and SigLIP vision towers: geometry and modules, shared by the families that carry one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from planner.models.decoder import layer_norm, linear, weighted
from planner.models.reading import Reader
from planner.models.tree import Component, Module

VISION: Component = "vision_tower"

# transformers' defaults of CLIPVisionConfig and SiglipVisionConfig (5.17).
_DEFAULTS: dict[str, dict[str, Any]] = {
    "clip_vision_model": {"patch_size": 32, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5},
    "siglip_vision_model": {
        "patch_size": 16, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6,
    },
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class TowerGeometry:
    """A vision transformer over square patches. `class_token`: CLIP's, one position more.

    vision_use_head: SigLIP's pooling head, built (and counted) even where no output uses it.
    """

    model_type: Literal["clip_vision_model", "siglip_vision_model"]
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_channels: int
    image_size: int
    patch_size: int
    hidden_act: str
    layer_norm_eps: float
    attention_dropout: float
    vision_use_head: bool

    @property
    def class_token(self) -> bool:
        return self.model_type == "clip_vision_model"

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def patches(self) -> int:
        """Patches of one image, the class token not among them."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def positions(self) -> int:
        return self.patches + self.class_token


def read_tower(reader: Reader, default_type: str) -> TowerGeometry:
    """Read a `vision_config`. A tower of another type is a problem noted in the reader."""
    model_type = reader.text("model_type", default_type)
    if model_type not in _DEFAULTS:
        reader.reject("model_type", "is not a known vision tower", model_type, ", ".join(_DEFAULTS))
        model_type = default_type
    given: Mapping[str, Any] = _DEFAULTS[model_type]
    tower = TowerGeometry(
        model_type=model_type,  # type: ignore[arg-type]
        hidden_size=reader.size("hidden_size", 768),
        intermediate_size=reader.size("intermediate_size", 3072),
        num_hidden_layers=reader.size("num_hidden_layers", 12, high=4096),
        num_attention_heads=reader.size("num_attention_heads", 12),
        num_channels=reader.size("num_channels", 3),
        image_size=reader.square("image_size", 224),
        patch_size=reader.square("patch_size", given["patch_size"]),
        hidden_act=reader.text("hidden_act", given["hidden_act"]),
        layer_norm_eps=reader.number("layer_norm_eps", given["layer_norm_eps"], high=1.0),
        attention_dropout=reader.number("attention_dropout", 0.0, high=1.0),
        vision_use_head=model_type == "siglip_vision_model"
        and reader.flag("vision_use_head", True),
    )
    if not reader.sound:
        return tower
    if tower.hidden_size % tower.num_attention_heads:
        reader.reject("num_attention_heads", f"does not divide hidden_size {tower.hidden_size}",
                      tower.num_attention_heads)  # fmt: skip
    if tower.patch_size > tower.image_size:
        reader.reject("patch_size", f"exceeds image_size {tower.image_size}", tower.patch_size)
    return tower


def tower_modules(tower: TowerGeometry, prefix: str) -> Iterator[Module]:
    """The tower's modules under `prefix` ("model.vision_tower."), in torch's order."""
    width = tower.hidden_size
    if tower.class_token:
        shapes = (("class_embedding", (width,)),)
        yield Module(f"{prefix}embeddings", "other", VISION, shapes)
    yield weighted(
        f"{prefix}embeddings.patch_embedding", "conv", VISION,
        width, tower.num_channels, tower.patch_size, tower.patch_size,
        bias=None if tower.class_token else width,
    )  # fmt: skip
    position = f"{prefix}embeddings.position_embedding"
    yield weighted(position, "embedding", VISION, tower.positions, width)
    if tower.class_token:
        yield layer_norm(f"{prefix}pre_layrnorm", VISION, width)
    for index in range(tower.num_hidden_layers):
        yield from _layer_modules(tower, f"{prefix}encoder.layers.{index}.")
    yield layer_norm(f"{prefix}post_layernorm", VISION, width)
    if tower.vision_use_head:
        yield from _pooling_head(tower, f"{prefix}head")


def _layer_modules(tower: TowerGeometry, prefix: str) -> Iterator[Module]:
    width = tower.hidden_size
    attention = [
        linear(f"{prefix}self_attn.{name}", VISION, width, width, bias=True)
        for name in ("k_proj", "v_proj", "q_proj", "out_proj")
    ]
    norm = layer_norm(f"{prefix}layer_norm1", VISION, width)
    if tower.class_token:
        yield from (*attention, norm, *_mlp(tower, prefix))
        yield layer_norm(f"{prefix}layer_norm2", VISION, width)
    else:
        yield from (norm, *attention, layer_norm(f"{prefix}layer_norm2", VISION, width))
        yield from _mlp(tower, prefix)


def _mlp(tower: TowerGeometry, prefix: str) -> tuple[Module, Module]:
    width, inner = tower.hidden_size, tower.intermediate_size
    return (
        linear(f"{prefix}mlp.fc1", VISION, width, inner, bias=True),
        linear(f"{prefix}mlp.fc2", VISION, inner, width, bias=True),
    )


def _pooling_head(tower: TowerGeometry, path: str) -> Iterator[Module]:
    width = tower.hidden_size
    yield Module(path, "other", VISION, (("probe", (1, 1, width)),))
    packed = (("in_proj_weight", (3 * width, width)), ("in_proj_bias", (3 * width,)))
    yield Module(f"{path}.attention", "other", VISION, packed)
    yield linear(f"{path}.attention.out_proj", VISION, width, width, bias=True)
    yield layer_norm(f"{path}.layernorm", VISION, width)
    yield from _mlp(tower, f"{path}.")
