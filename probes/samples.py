"""Full-length random samples for a model: text, and images where the spec asks for them.

labels = input_ids, image positions -100; the mask is all ones. What a processor would hand over
for images of one size, at the shapes of each family.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import PretrainedConfig

from planner.errors import InputError, Problem, UnsupportedError
from planner.models.families import llava_next
from planner.spec import RunSpec

Sample = dict[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class Images:
    """One image in a sample: its placeholder tokens, their id, and the model's inputs for it.

    tensors: name -> tensor, concatenated along the first dimension over all images of a batch.
    """

    tokens: int
    token_id: int
    tensors: dict[str, torch.Tensor]


class Pool(Dataset):
    """`length` samples, drawn from a few that repeat: the content moves neither bytes nor time."""

    def __init__(self, samples: list[Sample], length: int) -> None:
        self.samples, self.length = samples, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Sample:
        return self.samples[index % len(self.samples)]


def make_pool(spec: RunSpec, config: PretrainedConfig, length: int, seed: int = 0) -> Pool:
    """A data set of `length` samples of the spec's shape. Raises InputError when the images do not
    fit the sequence, UnsupportedError for a family whose image inputs are not known."""
    generator = torch.Generator().manual_seed(seed)
    image = image_of(spec, config) if spec.images_per_sample else None
    count = min(length, spec.micro_batch_size)
    return Pool([_sample(spec, config, image, generator) for _ in range(count)], length)


def _sample(
    spec: RunSpec, config: PretrainedConfig, image: Images | None, generator: torch.Generator
) -> Sample:
    places = _image_places(spec, image) if image is not None else torch.zeros(0, dtype=torch.long)
    low, high = _text_ids(config)
    ids = torch.randint(low, high, (spec.sequence_length,), generator=generator)
    if image is not None:
        ids[ids == image.token_id] = low
        ids[places] = image.token_id
    labels = ids.clone()
    sample = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    if image is not None:
        labels[places] = -100
        repeats = spec.images_per_sample
        for name, value in image.tensors.items():
            sample[name] = torch.cat([value] * repeats)
        if config.model_type.startswith("qwen2"):
            sample["mm_token_type_ids"] = (ids == image.token_id).long()
    return sample


def _image_places(spec: RunSpec, image: Images) -> torch.Tensor:
    """Positions of the placeholders: each image between two other tokens, as processors put a
    start and an end around it (models that count images tell them apart by these)."""
    each, count = image.tokens + 2, spec.images_per_sample
    if each * count > spec.sequence_length:
        message = f"is too short for {count} images of {image.tokens} tokens and their two marks"
        raise InputError(Problem("sequence_length", message, spec.sequence_length))
    return torch.cat([torch.arange(i * each + 1, (i + 1) * each - 1) for i in range(count)])


def _text_ids(config: PretrainedConfig) -> tuple[int, int]:
    """A range of ids that are text in every family: Chameleon's first 8,200 are image codes."""
    vocabulary = config.get_text_config().vocab_size
    return (min(9000, vocabulary // 2), min(31_000, vocabulary))


def collate(samples: list[Sample]) -> Sample:
    """Stack the token rows, concatenate the image inputs."""
    rows = ("input_ids", "attention_mask", "labels", "mm_token_type_ids")
    return {
        name: (torch.stack if name in rows else torch.cat)([sample[name] for sample in samples])
        for name in samples[0]
    }


def image_of(spec: RunSpec, config: PretrainedConfig) -> Images:
    """The image inputs of the config's family. Raises UnsupportedError for others."""
    makers: dict[str, Callable[[RunSpec, Any], Images]] = {
        "chameleon": _chameleon,
        "gemma3": _gemma3,
        "llava": _llava,
        "llava_next": _llava_next,
        "paligemma": _paligemma,
        "qwen2_vl": _qwen2_vl,
        "qwen2_5_vl": _qwen2_vl,
    }
    maker = makers.get(config.model_type)
    if maker is None:
        raise UnsupportedError(
            f"image inputs of {config.model_type!r} are unknown to the probes: {', '.join(makers)}"
        )
    return maker(spec, config)


def _chameleon(spec: RunSpec, config: Any) -> Images:
    vq = config.vq_config
    side = vq.resolution // 2 ** (len(vq.channel_multiplier) - 1)
    pixels = torch.rand(1, 3, vq.resolution, vq.resolution) * 2 - 1
    return Images(side * side, config.image_token_id, {"pixel_values": pixels})


def _llava(spec: RunSpec, config: Any) -> Images:
    vision = config.vision_config
    tokens = (vision.image_size // vision.patch_size) ** 2
    if config.vision_feature_select_strategy == "full":
        tokens += 1
    pixels = torch.randn(1, 3, vision.image_size, vision.image_size)
    return Images(tokens, config.image_token_id, {"pixel_values": pixels})


def _llava_next(spec: RunSpec, config: Any) -> Images:
    """The whole image and its tiles; as many features as the processor counts."""
    geometry = llava_next.geometry(config.to_dict())
    tokens = llava_next.image_tokens(geometry, spec.image_size)
    edge = config.vision_config.image_size
    tensors = {
        "pixel_values": torch.randn(1, llava_next.tiles(geometry, spec.image_size), 3, edge, edge),
        "image_sizes": torch.tensor([[spec.image_size, spec.image_size]]),
    }
    return Images(tokens, config.image_token_id, tensors)


def _paligemma(spec: RunSpec, config: Any) -> Images:
    vision = config.vision_config
    pixels = torch.randn(1, 3, vision.image_size, vision.image_size)
    tokens = (vision.image_size // vision.patch_size) ** 2
    return Images(tokens, config.image_token_id, {"pixel_values": pixels})


def _gemma3(spec: RunSpec, config: Any) -> Images:
    edge = config.vision_config.image_size
    pixels = torch.randn(1, 3, edge, edge)
    return Images(config.mm_tokens_per_image, config.image_token_id, {"pixel_values": pixels})


def _qwen2_vl(spec: RunSpec, config: Any) -> Images:
    vision = config.vision_config
    if spec.image_size is None:
        raise InputError(Problem("image_size", "is needed by a model of free image sizes"))
    unit = vision.patch_size * vision.spatial_merge_size
    side = max(1, round(spec.image_size / unit)) * vision.spatial_merge_size
    width = 3 * vision.temporal_patch_size * vision.patch_size**2
    tensors = {
        "pixel_values": torch.randn(side * side, width),
        "image_grid_thw": torch.tensor([[1, side, side]]),
    }
    return Images(side * side // vision.spatial_merge_size**2, config.image_token_id, tensors)
