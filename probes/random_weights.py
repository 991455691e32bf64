"""Random weights of a model's full size, made one tensor at a time on the device that takes them.

Given to `from_pretrained` as its state dict, so that loading runs transformers' own path (warm-up
of the allocator, quantisation on arrival, one tensor at a time) without a checkpoint on a disk.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

# Standard deviation of matrices; transformers' own default `initializer_range`.
_STD = 0.02


class RandomTensor:
    """Stands for one tensor of a checkpoint: `tensor[...]` makes it, as a safetensors slice does.

    shape: any; norm scales are ones (zeros where the norm adds one to them), biases zeros, the rest
    normal with deviation 0.02: as transformers initialises them.
    """

    def __init__(
        self, name: str, shape: torch.Size, dtype: torch.dtype, generator: torch.Generator,
        scale: float = 1.0,
    ) -> None:  # fmt: skip
        self.name, self.shape, self.dtype, self.scale = name, shape, dtype, scale
        self._generator = generator

    def __getitem__(self, _: Any) -> torch.Tensor:
        tensor = torch.empty(self.shape, dtype=self.dtype, device=self._generator.device)
        if not self.dtype.is_floating_point:
            return tensor.zero_()
        if self.name.endswith("bias"):
            return tensor.zero_()
        if len(self.shape) == 1 or "norm" in self.name.rsplit(".", 2)[-2]:
            return tensor.fill_(self.scale)
        return tensor.normal_(0.0, _STD, generator=self._generator)

    def is_floating_point(self) -> bool:
        return self.dtype.is_floating_point


def random_state(
    model_class: type[Any], config: Any, dtype: torch.dtype, device: torch.device, seed: int
) -> Mapping[str, RandomTensor]:
    """name -> RandomTensor for every tensor that a checkpoint of this model would hold.

    Tied weights are left out, as a checkpoint leaves them out.
    """
    with torch.device("meta"):
        skeleton = model_class(config)
    tied = set(getattr(skeleton, "all_tied_weights_keys", None) or {})
    generator = torch.Generator(device=device).manual_seed(seed)
    # Gemma's norms multiply by 1 + weight (modeling_gemma.py, GemmaRMSNorm)
    added = {
        f"{path}.weight"
        for path, module in skeleton.named_modules()
        if type(module).__name__.startswith("Gemma") and type(module).__name__.endswith("RMSNorm")
    }
    return {
        name: RandomTensor(
            name,
            value.shape,
            dtype if value.is_floating_point() else value.dtype,
            generator,
            scale=0.0 if name in added else 1.0,
        )
        for name, value in skeleton.state_dict().items()
        if name not in tied
    }
