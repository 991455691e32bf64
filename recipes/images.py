"""Chameleon's images as tokens: the frozen VQ encoder run without a graph, its codes kept."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from planner.errors import UnsupportedError


@torch.no_grad()
def image_token_ids(base: PreTrainedModel, pixel_values: Tensor) -> Tensor:
    """pixel_values (N, 3, H, W) -> token ids (N, tokens of an image). Four 512-pixel images at a
    time, or as many pixels: the encoder holds 0.28 GiB in 16 bits for each of those."""
    at_once = max(1, 4 * 512 * 512 // (pixel_values.shape[-1] * pixel_values.shape[-2]))
    inner = base.model
    weight = next(inner.vqmodel.encoder.parameters())
    inner.vqmodel.eval()
    parts = [
        inner.get_image_tokens(part.to(weight.device, weight.dtype))
        for part in pixel_values.split(at_once)
    ]
    return torch.cat(parts)


def with_image_tokens(
    base: PreTrainedModel, input_ids: Tensor, pixel_values: Tensor | None
) -> Tensor:
    """input_ids with each `<image>` placeholder replaced by its image's own token. The same
    forward as handing over pixel_values, which embeds those tokens at those places."""
    if pixel_values is None:
        return input_ids
    if base.config.model_type != "chameleon":
        raise UnsupportedError(f"{base.config.model_type}: images have no token ids of their own")
    ids = image_token_ids(base, pixel_values)
    places = input_ids == base.model.vocabulary_mapping.image_token_id
    filled = input_ids.clone()
    filled[places] = ids.flatten().to(filled)
    return filled
