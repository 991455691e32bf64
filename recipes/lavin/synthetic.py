"""Full-length random batches for measuring: a picture a sample, the last tokens as the answer."""

from __future__ import annotations

from typing import Any

import torch

from planner.spec import RunSpec
from recipes.data.batches import Batch
from recipes.data.encoding import IGNORED
from recipes.lavin.config import LavinConfig
from recipes.lavin.model import IMAGE_PLACEHOLDER


def random_batch(spec: RunSpec, config: LavinConfig, seed: int) -> Batch:
    """`micro_batch_size` samples whose length in the language model is `sequence_length`, the
    modality token and the visual tokens of `images_per_sample` (0 or 1) included."""
    draw = torch.Generator().manual_seed(seed)
    rows, width = spec.micro_batch_size, spec.sequence_length - 1
    ids = torch.randint(3, config.text.vocab_size, (rows, width), generator=draw)
    labels = torch.full_like(ids, IGNORED)
    labels[:, width // 2 :] = ids[:, width // 2 :]
    batch = {"input_ids": ids, "labels": labels}
    if spec.images_per_sample:
        ids[:, 1 : 1 + config.visual_tokens] = IMAGE_PLACEHOLDER
        size: Any = config.vision.image_size
        batch["pixel_values"] = torch.randn((rows, 3, size, size), generator=draw)
    return batch
