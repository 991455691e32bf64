"""Qwen2.5-VL: Qwen2-VL with RMSNorm, a gated MLP and windowed attention in its tower."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from planner.models.families import qwen2_vl
from planner.models.families.qwen2_vl import PatchVision, QwenVlGeometry
from planner.models.reading import Reader

AUTO_CLASS = "AutoModelForImageTextToText"


def geometry(config: Mapping[str, Any]) -> QwenVlGeometry:
    """The geometry that config.json describes; InputError names every bad key."""
    reader = Reader(config)
    inner = reader.inner("vision_config")
    vision = PatchVision(
        depth=inner.size("depth", 32, high=4096),
        hidden_size=inner.size("hidden_size", 3584),
        intermediate_size=inner.size("intermediate_size", 3420),
        output_size=inner.size("out_hidden_size", 3584),
        num_attention_heads=inner.size("num_heads", 16),
        hidden_act=inner.text("hidden_act", "silu"),
        rms=True,
        window_size=inner.size("window_size", 112),
        full_attention_blocks=inner.sizes("fullatt_block_indexes", (7, 15, 23, 31)),
        **qwen2_vl.patch_sizes(inner),
    )
    text = qwen2_vl.read_text(reader, "qwen2_5_vl_text")
    read = QwenVlGeometry(text, vision, qwen2_vl.read_tied(reader))
    reader.check()
    return read


modules = qwen2_vl.modules
image_tokens = qwen2_vl.image_tokens
image_features = qwen2_vl.image_features
patch_grid = qwen2_vl.patch_grid
forward = qwen2_vl.forward
pixels = qwen2_vl.pixels
