"""Loading a model as `from_pretrained` does, and putting adapters on it, as two steps.

One load serves several probes: the adapters, the k-bit preparation apart, come off again.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

from planner.spec import RunSpec
from probes.random_weights import random_state
from recipes.build import Built, weights_dtype, with_adapters
from recipes.models import model_class
from recipes.quantize import keep_torch_kernels_on_cpu, quantization_config


def load_base(
    spec: RunSpec,
    config: PretrainedConfig,
    device: torch.device,
    weights: str | Path = "random",
    seed: int = 0,
) -> PreTrainedModel:
    """The base model through transformers' own `from_pretrained`: from a checkpoint, or from random
    tensors made on the device one at a time. Quantised on arrival; no adapters yet."""
    dtype = weights_dtype(spec)
    loader = model_class(config)
    source: dict[str, Any] = {"pretrained_model_name_or_path": str(weights)}
    if str(weights) == "random":
        state = random_state(loader, config, dtype, device, seed)
        source = {"pretrained_model_name_or_path": None, "state_dict": state}
    model: PreTrainedModel = loader.from_pretrained(
        **source,
        config=config,
        dtype=dtype,
        quantization_config=quantization_config(spec, dtype),
        attn_implementation=spec.attention,
        device_map={"": device},
    )
    if device.type == "cpu":
        keep_torch_kernels_on_cpu(model)
    return model


def adapt(base: PreTrainedModel, spec: RunSpec, device: torch.device) -> Built:
    """The spec's adapters (and k-bit preparation) on a loaded base."""
    return Built(with_adapters(base, spec), base, base.config, spec, device)
