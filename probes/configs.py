"""A model's name -> its transformers configuration, at full size or shrunk for a CPU."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from planner.models.registry import load_model
from recipes.models import chameleon_vocabulary_map, load_config

# What each size becomes in a tiny model; smaller values stay. Heads divide widths.
_TINY = {
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "query_pre_attn_scalar": 16, "max_window_layers": 2, "sliding_window": 32,
}  # fmt: skip
_TINY_VISION = {
    "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "image_size": 28, "patch_size": 14, "depth": 2, "embed_dim": 32, "num_heads": 2,
    "projection_dim": 32,
}  # fmt: skip
_TINY_VQ = {
    "embed_dim": 16, "num_embeddings": 32, "latent_channels": 16, "base_channels": 32,
    "channel_multiplier": [1, 1], "num_res_blocks": 1, "resolution": 8,
}  # fmt: skip
_IDS = (
    "bos_token_id", "eos_token_id", "pad_token_id", "vision_start_token_id",
    "vision_end_token_id", "vision_token_id", "video_token_id", "video_token_index",
)  # fmt: skip


def config_for(name: str, tiny: bool = False) -> PretrainedConfig:
    """The catalogue's configuration, or a folder's or config.json's. Raises InputError."""
    path = Path(name)
    if path.is_dir() or path.is_file():
        config = load_config(str(path))
    else:
        config = load_config(dict(load_model(name).config))
    # Shrunk from the complete configuration: a config.json may leave its sizes to the defaults.
    return load_config(shrink(config.to_dict())) if tiny else config


def shrink(values: Mapping[str, Any]) -> dict[str, Any]:
    """The same family with a few narrow layers: a second's work on a CPU."""
    small = _small(values, _TINY)
    for key in ("text_config", "vision_config", "vq_config"):
        if isinstance(values.get(key), Mapping):
            rules: dict[str, Mapping[str, Any]] = {
                "text_config": _TINY,
                "vision_config": _TINY_VISION,
                "vq_config": _TINY_VQ,
            }
            small[key] = _small(values[key], rules[key])
    kind = values.get("model_type", "")
    if kind == "chameleon":
        small["vq_config"] = dict(_TINY_VQ)
        small["vocabulary_map"] = chameleon_vocabulary_map(32, 10, 5)
        small["image_token_id"] = 5
    elif "vision_config" in small:
        small["image_token_id"] = 7
        small.pop("image_token_index", None)
    if kind.startswith("qwen2") and "vl" in kind:
        small["vision_config"] = {**_TINY_VISION, "hidden_size": 64, "in_chans": 3}
        sections = {"type": "mrope", "rope_type": "default", "mrope_section": [2, 3, 3]}
        for place in (small, small.get("text_config", {})):
            for key in ("rope_scaling", "rope_parameters"):
                if place.get(key):
                    place[key] = {**place[key], **sections}
    return small


def _small(values: Mapping[str, Any], rules: Mapping[str, Any]) -> dict[str, Any]:
    small = {
        key: rules[key] if key in rules and isinstance(value, int | list) else value
        for key, value in values.items()
    }
    for key in _IDS:
        if isinstance(small.get(key), int | list):
            small[key] = 1
    small.pop("layer_types", None)
    return small
