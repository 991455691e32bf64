"""The probes' own batch on meta: token rows with their values, pixels without."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

from planner.errors import InputError, Problem, UnsupportedError
from planner.spec import RunSpec
from probes.dry import values
from probes.samples import Images, _sample, collate, image_of

Batch = dict[str, torch.Tensor]


class Batches:
    """Makes micro batches of a spec: input_ids, attention_mask and labels [rows, length], and the
    model's image inputs. What a sample holds is drawn once; every row is that sample."""

    def __init__(self, spec: RunSpec, config: PretrainedConfig, model: PreTrainedModel) -> None:
        self.spec = spec
        image = _image(spec, config, model) if spec.images_per_sample else None
        sample = _sample(spec, config, image, torch.Generator().manual_seed(0))
        self._pixels = {name: t for name, t in sample.items() if t.is_floating_point()}
        self._integers = {name: t for name, t in sample.items() if name not in self._pixels}

    def make(self, rows: int) -> Batch:
        """A batch of `rows` samples. Small integer tensors keep their values."""
        return {name: _placed(tensor) for name, tensor in self.host(rows).items()}

    def host(self, rows: int) -> Batch:
        """The same batch before it is sent: integers on the host, pixels without bytes there."""
        batch = collate([self._integers] * rows)
        for name, pixels in self._pixels.items():
            shape = (rows * len(pixels), *pixels.shape[1:])
            batch[name] = torch.empty((), dtype=pixels.dtype).expand(shape)
        return batch


def _placed(tensor: torch.Tensor) -> torch.Tensor:
    placed = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
    small = tensor.numel() <= values.MAX_ELEMENTS and not tensor.is_floating_point()
    return values.give(placed, tensor) if small else placed


def _image(spec: RunSpec, config: PretrainedConfig, model: PreTrainedModel) -> Images:
    try:
        return image_of(spec, config)
    except UnsupportedError:
        return _asked(spec, config, model)


@torch.no_grad()
def _asked(spec: RunSpec, config: PretrainedConfig, model: Any) -> Images:
    """An image of a model that the probes do not know: one square of pixels, as many placeholder
    tokens as the model's own `get_image_features` gives. Raises UnsupportedError."""
    vision: Any = getattr(config, "vision_config", None)
    token_id = getattr(config, "image_token_id", None) or getattr(config, "image_token_index", None)
    size = spec.image_size or getattr(vision, "image_size", None)
    size = size[0] if isinstance(size, (list, tuple)) else size
    if vision is None or token_id is None or not hasattr(model, "get_image_features"):
        raise UnsupportedError(f"image inputs of {config.model_type!r} are not known")
    if not isinstance(size, int):
        raise InputError(Problem("image_size", "is needed by a model of free image sizes"))
    reason = ""
    for shape in ((1, 3, size, size), (1, 1, 3, size, size)):  # some take (images, tiles, ...)
        pixels = torch.empty(shape, device="meta", dtype=model.dtype)
        try:
            found = model.get_image_features(pixel_values=pixels)
        except (TypeError, RuntimeError, NotImplementedError, AttributeError, ValueError) as error:
            reason = reason or str(error).splitlines()[0]
            continue
        features = getattr(found, "pooler_output", found)
        rows = features if isinstance(features, torch.Tensor) else torch.cat(list(features))
        tokens = rows.numel() // rows.shape[-1]
        return Images(tokens, token_id, {"pixel_values": torch.empty(shape, device="meta")})
    raise UnsupportedError(f"image inputs of {config.model_type!r} are not known: {reason}")
