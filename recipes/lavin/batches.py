"""Encoded samples with pictures -> the batches that the model takes."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from planner.errors import InputError, Problem
from recipes.data.batches import Batch, Batches

# Mean and deviation of CLIP's own preprocessing (openai/CLIP, clip.py).
_MEAN = (0.48145466, 0.4578275, 0.40821073)
_DEVIATION = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class LavinBatches(Batches):
    """`Batches` with `pixel_values`: of the samples that have a picture, or, with `blanks`, of all,
    zeros where there is none (what the published batch behaviour takes)."""

    image_size: int = 224
    blanks: bool = False

    def batch(self, places: Sequence[int]) -> Batch:
        made = super().batch(places)
        images = [self.samples[place].image for place in places]
        pictures = [
            torch.zeros(3, self.image_size, self.image_size) if i is None
            else picture(i, self.image_size)
            for i in images if self.blanks or i is not None
        ]  # fmt: skip
        if pictures:
            made["pixel_values"] = torch.stack(pictures)
        return made


@lru_cache(maxsize=1024)
def picture(image: str | bytes, size: int) -> Tensor:
    """(3, size, size), stretched to the square (bicubic), normalised as CLIP's. Raises InputError
    for what cannot be read as a picture."""
    from PIL import Image, UnidentifiedImageError

    try:
        source = Path(image) if isinstance(image, str) else io.BytesIO(image)
        with Image.open(source) as opened:
            drawn = opened.convert("RGB").resize((size, size), Image.Resampling.BICUBIC)
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        name = image if isinstance(image, str) else f"{len(image)} bytes"
        raise InputError(Problem("data.image", f"cannot be read: {error}", name)) from None
    values = torch.from_numpy(np.asarray(drawn).copy()).permute(2, 0, 1).float() / 255
    return (values - torch.tensor(_MEAN)[:, None, None]) / torch.tensor(_DEVIATION)[:, None, None]
