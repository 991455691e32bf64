"""A run spec -> a LaVIN on its device, adapters in place, nothing run yet.

The language model is made, and where asked quantised, a weight at a time on the device: no 16-bit
copy of it exists whole, on the host or on the card.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import CLIPVisionModel, LlamaForCausalLM

from planner.errors import InputError, Problem
from planner.spec import RunSpec
from recipes.build import COMPUTE_DTYPES, DTYPES, allocator_settings
from recipes.lavin.config import LavinConfig, lavin_config
from recipes.lavin.model import Lavin
from recipes.quantize import keep_torch_kernels_on_cpu, quantization_config, random_model


@dataclass(frozen=True, slots=True)
class BuiltLavin:
    """What a step runs on."""

    model: Lavin
    config: LavinConfig
    spec: RunSpec
    device: torch.device


def build_lavin(
    spec: RunSpec,
    config: LavinConfig | None = None,
    device: str | torch.device = "cuda",
    *,
    seed: int = 0,
    language: str | Path = "random",
    vision: str | Path = "random",
) -> BuiltLavin:
    """Build the spec's LaVIN ("lavin-7b", ...; `config` overrides the name) on `device`.

    language, vision: "random", or a LLaMA and a CLIP checkpoint for `from_pretrained`. Frozen
    weights are in the spec's `weights_dtype`, 4-bit linears compute in its `precision`; lm_head,
    embeddings, norms and the tower are not quantised; what trains is fp32. Raises InputError.
    """
    if spec.quantization == "int8":
        raise InputError(
            Problem("quantization", "is not built for LaVIN", "int8", "none, nf4, fp4")
        )
    target = torch.device(device)
    if target.type == "cuda":
        allocator_settings(spec)
    config = copy.deepcopy(config if config is not None else lavin_config(spec.model))
    torch.manual_seed(seed)
    text = _language(spec, config, target, language)
    if target.type == "cpu":
        keep_torch_kernels_on_cpu(text)
    model = Lavin(text, _vision(spec, config, target, vision), config)
    if spec.gradient_checkpointing:
        model.checkpoint_layers()
    return BuiltLavin(model.train(), config, spec, target)


def _language(
    spec: RunSpec, config: LavinConfig, device: torch.device, weights: str | Path
) -> LlamaForCausalLM:
    dtype = DTYPES[spec.weights_dtype]
    quantization = quantization_config(spec, COMPUTE_DTYPES[spec.precision])
    if str(weights) == "random":
        return random_model(config.text, quantization, dtype, spec.attention, device)  # type: ignore[return-value]
    return LlamaForCausalLM.from_pretrained(
        str(weights), config=config.text, dtype=dtype, quantization_config=quantization,
        attn_implementation=spec.attention, device_map={"": device},
    )  # fmt: skip


def _vision(
    spec: RunSpec, config: LavinConfig, device: torch.device, weights: str | Path
) -> CLIPVisionModel:
    values: dict[str, Any] = {
        "dtype": DTYPES[spec.weights_dtype], "attn_implementation": spec.attention,
    }  # fmt: skip
    if str(weights) != "random":
        return CLIPVisionModel.from_pretrained(
            str(weights), config=config.vision, device_map={"": device}, **values
        )
    where: Any = device
    with torch.device(where):
        return CLIPVisionModel._from_config(config.vision, **values)
