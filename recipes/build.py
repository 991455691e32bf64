"""A run spec -> the model it trains: base, quantisation, adapters, ready for either stack."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import (
    AdaptionPromptConfig,
    LoraConfig,
    PeftConfig,
    get_peft_model,
    prepare_model_for_kbit_training,
)
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from planner.errors import InputError, Problem
from planner.spec import RunSpec
from recipes.models import load_config, model_class
from recipes.quantize import keep_torch_kernels_on_cpu, quantization_config, random_model

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
COMPUTE_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True, slots=True)
class Built:
    """What a step runs on. `model` is what is trained (a PeftModel with adapters, else the base
    itself), `base` the transformers model inside it."""

    model: nn.Module
    base: PreTrainedModel
    config: PretrainedConfig
    spec: RunSpec
    device: torch.device


def build(
    spec: RunSpec,
    *,
    config: PretrainedConfig | dict[str, Any] | str | None = None,
    device: str | torch.device = "cuda",
    seed: int = 0,
    weights: str | Path = "random",
) -> Built:
    """Build the spec's model on `device`, adapters in place, nothing run yet.

    config: overrides the spec's model name; weights: "random", or a checkpoint for
    `from_pretrained`. "stock" is prepared as the reference workload says (peft's k-bit preparation
    where quantised); "lean" keeps every frozen tensor in 16 bits. Raises InputError.
    """
    if spec.method == "full" and spec.quantization != "none":
        raise InputError(Problem("method", "quantised weights cannot be trained in full", "full",
                                 "lora, or quantization none"))  # fmt: skip
    target = torch.device(device)
    if target.type == "cuda":
        allocator_settings(spec)
    torch.manual_seed(seed)
    loaded = copy.deepcopy(load_config(config if config is not None else spec.model))
    base = _base_model(spec, loaded, target, weights)
    if target.type == "cpu":
        keep_torch_kernels_on_cpu(base)
    return Built(with_adapters(base, spec), base, base.config, spec, target)


def weights_dtype(spec: RunSpec) -> torch.dtype:
    """Dtype of what is not quantised, as loaded. The lean stack runs without autocast, so its
    weights take the dtype that autocast would compute in (a full fine-tune keeps its own)."""
    if spec.stack == "lean" and spec.method == "lora":
        return COMPUTE_DTYPES[spec.precision]
    return DTYPES[spec.weights_dtype]


def allocator_settings(spec: RunSpec) -> None:
    """Expandable segments as the spec says, and always for the lean stack, whose chunks and
    recomputed layers differ in size. Takes effect for segments not yet mapped."""
    wanted = spec.expandable_segments or spec.stack == "lean"
    if wanted and torch.cuda.is_available():
        torch.cuda.memory._set_allocator_settings("expandable_segments:True")


def _base_model(
    spec: RunSpec, config: PretrainedConfig, device: torch.device, weights: str | Path
) -> PreTrainedModel:
    dtype = weights_dtype(spec)
    quantization = quantization_config(spec, dtype)
    if str(weights) == "random":
        return random_model(config, quantization, dtype, spec.attention, device)
    return model_class(config).from_pretrained(
        str(weights),
        config=config,
        dtype=dtype,
        quantization_config=quantization,
        attn_implementation=spec.attention,
        device_map={"": device},
    )


def with_adapters(base: PreTrainedModel, spec: RunSpec) -> nn.Module:
    """What trains on the base: its adapters, or all of it. Raises InputError."""
    if spec.method == "full":
        return base.requires_grad_(True)
    if spec.quantization != "none" and spec.stack == "stock":
        base = prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)
    base.requires_grad_(False)
    try:
        return get_peft_model(base, adapter_config(spec))
    except ValueError as error:
        problem = Problem("lora.target_modules", str(error).splitlines()[0],
                          spec.lora.target_modules)  # fmt: skip
        raise InputError(problem) from None


def adapter_config(spec: RunSpec) -> PeftConfig:
    """The spec's adapter as peft takes it."""
    if spec.adapter == "lora":
        return lora_config(spec)
    prompt = spec.adaption_prompt
    return AdaptionPromptConfig(
        adapter_len=prompt.adapter_len, adapter_layers=prompt.adapter_layers, task_type="CAUSAL_LM"
    )


def lora_config(spec: RunSpec) -> LoraConfig:
    """The spec's LoRA."""
    targets = spec.lora.target_modules
    return LoraConfig(
        r=spec.lora.rank,
        lora_alpha=spec.lora.alpha,  # type: ignore[arg-type]
        lora_dropout=spec.lora.dropout,
        target_modules=targets if isinstance(targets, str) else list(targets),
        bias="none",
        task_type="CAUSAL_LM",
    )
