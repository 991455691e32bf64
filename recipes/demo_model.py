"""The demo's base model: a tiny Chameleon at random weights whose image codebook is fitted to
pictures, as a published model's is, so that a code says something about a patch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from recipes.models import model_class


def write_demo_model(
    folder: Path, config: PretrainedConfig, tokenizer: Any, pictures: Tensor, seed: int
) -> Path:
    """Make and save model and tokenizer; `folder` is then a checkpoint like any other."""
    torch.manual_seed(seed)
    model = model_class(config)(config)
    fit_codebook(model, pictures)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@torch.no_grad()
def fit_codebook(model: PreTrainedModel, pictures: Tensor, rounds: int = 8) -> None:
    """Lloyd's algorithm on the encoder's own outputs: pictures (N, 3, H, W) -> the codebook."""
    vq = model.model.vqmodel
    maps = torch.cat([vq.quant_conv(vq.encoder(part)) for part in pictures.split(64)])
    points = maps.permute(0, 2, 3, 1).reshape(-1, maps.shape[1])
    count = vq.quantize.num_embeddings
    chosen = torch.randperm(len(points), generator=torch.Generator().manual_seed(0))[:count]
    centres = points[chosen].clone()
    for _ in range(rounds):
        nearest = torch.cdist(points, centres).argmin(1)
        sums = torch.zeros_like(centres).index_add_(0, nearest, points)
        members = torch.bincount(nearest, minlength=count)[:, None]
        centres = torch.where(members > 0, sums / members.clamp(min=1), centres)
    vq.quantize.embedding.weight.copy_(centres)
