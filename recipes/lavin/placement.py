"""Adapters into the layers of a tower: before its attention, its MLP, or both."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from planner.errors import InputError, Problem
from recipes.lavin.adapters import AdaptedNorm, MixtureOfModalityAdapter
from recipes.lavin.config import LavinConfig, Placement

# The norm whose output flows into the half, by its name in LlamaDecoderLayer and CLIPEncoderLayer.
LLAMA_NORMS = {"attention": "input_layernorm", "mlp": "post_attention_layernorm"}
CLIP_NORMS = {"attention": "layer_norm1", "mlp": "layer_norm2"}


def insert_adapters(
    layers: Any, norms: dict[str, str], placement: Placement | None, width: int,
    config: LavinConfig, across_batch: bool = False,
) -> int:  # fmt: skip
    """Wrap the norms that the placement names, in place; how many. They are made on the norm's
    device, in fp32. Raises InputError for a layer that does not exist."""
    if placement is None:
        return 0
    chosen = range(len(layers)) if placement.layers is None else placement.layers
    missing = [index for index in chosen if not 0 <= index < len(layers)]
    if missing:
        allowed = f"0 to {len(layers) - 1}"
        raise InputError(Problem("placement.layers", "no such layer", missing[0], allowed))
    halves = ("attention", "mlp") if placement.where == "both" else (placement.where,)
    for index in chosen:
        for half in halves:
            norm = getattr(layers[index], norms[half])
            adapter = MixtureOfModalityAdapter(width, config, across_batch)
            adapter = adapter.to(norm.weight.device)
            setattr(layers[index], norms[half], AdaptedNorm(norm, adapter))
    return len(chosen) * len(halves)


def adapters_of(tower: nn.Module) -> Iterator[tuple[str, MixtureOfModalityAdapter]]:
    """(name, adapter) of every adapter, in the order of the layers."""
    for name, module in tower.named_modules():
        if isinstance(module, MixtureOfModalityAdapter):
            yield name, module
