"""Full-length random samples of a spec's shape: what the reference workload and probes train on."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PretrainedConfig

from planner.spec import RunSpec


class RandomSamples(Dataset):
    """`count` samples of `sequence_length` random text tokens, labels equal to them; with images,
    each sample starts with its image placeholders (labels -100) and carries `pixel_values` of
    shape (images_per_sample, 3, size, size). Chameleon's image ids are never drawn."""

    def __init__(self, spec: RunSpec, config: PretrainedConfig, count: int, seed: int = 0) -> None:
        self._spec, self._config, self._count, self._seed = spec, config, count, seed

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not 0 <= index < self._count:
            raise IndexError(index)
        spec = self._spec
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + index)
        low, high = self._text_ids()
        ids = torch.randint(low, high, (spec.sequence_length,), generator=generator)
        sample = {"input_ids": ids, "labels": ids.clone()}
        if spec.images_per_sample:
            self._add_images(sample, generator)
        return sample

    def _text_ids(self) -> tuple[int, int]:
        vocabulary = self._config.get_text_config().vocab_size
        special = getattr(self._config, "vocabulary_map", None)
        if not special:
            return min(10, vocabulary - 1), vocabulary
        return min(max(special.values()) + 1, vocabulary - 1), vocabulary

    def _add_images(self, sample: dict[str, Tensor], generator: torch.Generator) -> None:
        config, count = self._config, self._spec.images_per_sample
        size = self._spec.image_size or config.vq_config.resolution
        tokens = count * image_tokens(config)
        sample["input_ids"][:tokens] = config.image_token_id
        sample["labels"][:tokens] = -100
        sample["pixel_values"] = torch.rand((count, 3, size, size), generator=generator) * 2 - 1


def image_tokens(config: PretrainedConfig) -> int:
    """Tokens of one Chameleon image: its side over 2 for each level below the first, squared."""
    vq = config.vq_config
    return (vq.resolution >> (len(vq.channel_multiplier) - 1)) ** 2


def stack(samples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Samples -> a batch; pixel_values become (batch * images_per_sample, 3, size, size)."""
    batch = {key: torch.stack([sample[key] for sample in samples]) for key in samples[0]}
    if "pixel_values" in batch:
        batch["pixel_values"] = batch["pixel_values"].flatten(0, 1)
    return batch
