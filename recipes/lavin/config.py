"""What a LaVIN is made of: two towers' configurations and its adapters' settings."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

from transformers import CLIPVisionConfig, LlamaConfig

from planner.errors import InputError, Problem, nearest_name

Where = Literal["attention", "mlp", "both"]
Routing = Literal["outputs", "bottleneck"]


@dataclass(frozen=True, slots=True)
class Placement:
    """Before which halves of which layers adapters stand. layers: indices, None for all."""

    where: Where = "attention"
    layers: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class LavinConfig:
    """Defaults are those of the published 7B.

    bottleneck, groups, dropout, scale, temperature: of an adapter (`recipes.lavin.adapters`);
    routing: how its two paths are mixed, equal in value; text_adapters, vision_adapters: where they
    stand, None for none; projector_size: width of the visual tokens' MLP; visual_every: a visual
    token is the class token of every this many layers of the tower; published_batch: route the
    tower as the published code does for a batch (each position by the first image's same position)
    and encode a blank picture for a sample without one.
    """

    text: LlamaConfig
    vision: CLIPVisionConfig
    bottleneck: int = 8
    groups: int = 2
    dropout: float = 0.1
    scale: float = 1.0
    temperature: float = 10.0
    routing: Routing = "outputs"
    text_adapters: Placement | None = field(default_factory=Placement)
    vision_adapters: Placement | None = field(default_factory=Placement)
    projector_size: int = 128
    visual_every: int = 4
    published_batch: bool = False

    @property
    def visual_tokens(self) -> int:
        """Tokens a picture takes in the language model."""
        return self.vision.num_hidden_layers // self.visual_every


# hidden, intermediate, layers, heads of LLaMA 1 (huggyllama/llama-*; planner/models/catalogue), and
# the router's temperature: 10 and 5 are published for 7B and 13B, 65B was not, it takes 13B's.
_SIZES: dict[str, tuple[int, int, int, int, float]] = {
    "7b": (4096, 11008, 32, 32, 10.0),
    "13b": (5120, 13824, 40, 40, 5.0),
    "65b": (8192, 22016, 80, 64, 5.0),
}


def lavin_config(size: str, **changes: Any) -> LavinConfig:
    """7b, 13b, 65b or tiny (also as lavin-7b) -> the configuration, `changes` applied."""
    name = size.lower().removeprefix("lavin-")
    if name == "tiny":
        return replace(tiny_config(), **changes)
    if name not in _SIZES:
        known = (*_SIZES, "tiny")
        raise InputError(
            Problem("model", "is no LaVIN", size, ", ".join(known), nearest_name(name, known))
        )
    hidden, intermediate, layers, heads, temperature = _SIZES[name]
    text = LlamaConfig(
        vocab_size=32000, hidden_size=hidden, intermediate_size=intermediate,
        num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=heads,
        max_position_embeddings=2048, rms_norm_eps=1e-6,
    )  # fmt: skip
    values = {"temperature": temperature, **changes}
    return LavinConfig(text=text, vision=clip_vit_large_config(), **values)


def clip_vit_large_config() -> CLIPVisionConfig:
    """CLIP ViT-L/14 at 224 pixels (openai/clip-vit-large-patch14): 257 positions of 1024."""
    return CLIPVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16,
        image_size=224, patch_size=14, projection_dim=768,
    )  # fmt: skip


def tiny_config(vocab_size: int = 512) -> LavinConfig:
    """Two towers of under a million parameters; a 32-pixel picture is 3 visual tokens."""
    text = LlamaConfig(
        vocab_size=vocab_size, hidden_size=64, intermediate_size=128, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=512,
        initializer_range=0.125,
    )  # fmt: skip
    vision = CLIPVisionConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=6, num_attention_heads=4,
        image_size=32, patch_size=8, projection_dim=32,
    )  # fmt: skip
    return LavinConfig(text=text, vision=vision, projector_size=32, visual_every=2)
