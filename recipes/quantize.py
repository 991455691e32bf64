"""A model at random weights, made module by module on its device, quantised as it is made.

What `from_pretrained` with a `BitsAndBytesConfig` leaves behind, without a checkpoint: the
quantiser of transformers itself swaps the modules, and a 16-bit copy exists of one weight at a
time.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PretrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.quantizers.auto import AutoHfQuantizer

from planner.spec import RunSpec
from recipes.models import model_class


def quantization_config(spec: RunSpec, compute: torch.dtype) -> BitsAndBytesConfig | None:
    """The spec's quantisation in transformers' words; None without."""
    if spec.quantization == "none":
        return None
    if spec.quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=spec.quantization,
        bnb_4bit_use_double_quant=spec.double_quant,
        bnb_4bit_compute_dtype=compute,
    )


def random_model(
    config: PretrainedConfig,
    quantization: BitsAndBytesConfig | None,
    dtype: torch.dtype,
    attention: str,
    device: torch.device,
) -> PreTrainedModel:
    """The model class at random weights on `device`: linears quantised, the rest in `dtype`."""
    with torch.device("meta"), no_init_weights():
        model = model_class(config)._from_config(config, dtype=dtype, attn_implementation=attention)
        quantizer = _swap_modules(model, quantization)
    _materialise(model, dtype, device)
    model.initialize_weights()
    model.tie_weights()
    if quantizer is not None:
        model.hf_quantizer = quantizer
        quantizer.postprocess_model(model)
    return model.eval()


def keep_torch_kernels_on_cpu(model: nn.Module) -> None:
    """On a CPU with AVX512-BF16, bitsandbytes repacks a 4-bit weight for inference at the first
    forward in eval mode, and the repacked weight has no backward: keep the plain layout."""
    attribute = "support_avx512bf16_for_cpu"
    for module in model.modules():
        if hasattr(module, attribute):
            setattr(module, attribute, False)


def _swap_modules(model: PreTrainedModel, quantization: BitsAndBytesConfig | None) -> Any:
    if quantization is None:
        return None
    quantizer = AutoHfQuantizer.from_config(quantization, pre_quantized=False)
    quantizer.validate_environment(device_map=None)
    model.config.quantization_config = quantization
    quantizer.preprocess_model(model=model, device_map=None)
    return quantizer


@torch.no_grad()
def _materialise(model: PreTrainedModel, dtype: torch.dtype, device: torch.device) -> None:
    from bitsandbytes.nn.modules import Linear4bit, Linear8bitLt

    std = getattr(model.config.get_text_config(), "initializer_range", 0.02)
    kept = model._get_dtype_plan(dtype)
    tied = set(model.all_tied_weights_keys)
    modules: list[tuple[str, Any]] = list(model.named_modules())
    for name, module in modules:
        quantised = isinstance(module, (Linear4bit, Linear8bitLt))
        for key, parameter in list(module._parameters.items()):
            full_name = f"{name}.{key}"
            if parameter is None or full_name in tied:
                continue
            if quantised and key == "weight":
                _set_quantised_weight(module, dtype, std, device)
                continue
            wanted = next((d for p, d in kept.items() if re.search(p, full_name)), parameter.dtype)
            values = torch.empty(parameter.shape, dtype=wanted, device=device)
            module._parameters[key] = nn.Parameter(
                values.zero_() if quantised else values,
                requires_grad=parameter.requires_grad,
            )
        for key, buffer in list(module._buffers.items()):
            if buffer is not None:
                module._buffers[key] = torch.zeros(buffer.shape, dtype=buffer.dtype, device=device)
        module.__dict__["_is_hf_initialized"] = quantised


def _set_quantised_weight(
    module: nn.Linear, dtype: torch.dtype, std: float, device: torch.device
) -> None:
    from bitsandbytes.nn.modules import Int8Params, Linear4bit, Params4bit

    shape = (module.out_features, module.in_features)
    values = torch.empty(shape, dtype=dtype, device=device).normal_(0.0, std)
    attributes = dict(module.weight.__dict__)
    if isinstance(module, Linear4bit):
        weight = _quantised(Params4bit(values, requires_grad=False, **attributes), device)
    else:
        attributes = {k: v for k, v in attributes.items() if k not in ("SCB", "CB")}
        weight = Int8Params(values, requires_grad=False, **attributes)._quantize(device)
    module.weight = weight


def _quantised(weight: Any, device: torch.device) -> Any:
    """What `.to(device)` of a not yet quantised bitsandbytes parameter returns."""
    return weight.to(device)
