"""One function a tool: a run spec in the tool's own words, and what it answers.

A tool that raises refuses, and its words are kept. An option that a tool lacks is `NotOffered`,
said here: it would otherwise price another run than the one that was measured.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

from planner.devices import find_device
from planner.dtypes import DType
from planner.models.registry import load_model
from planner.spec import RunSpec
from planner.units import GIB, MIB

# What an estimate stands for: bytes of the loaded model, of torch's live tensors at the peak, or
# what the card must have free.
Quantity = Literal["weights", "allocated", "device"]
Answers = dict[Quantity, int]


class NotOffered(Exception):  # noqa: N818 (no fault: a fact about the tool)
    """The tool has no option for what was run."""


@dataclass(frozen=True, slots=True)
class Tool:
    """distribution: its name on PyPI; quantities: what it answers."""

    distribution: str
    quantities: tuple[Quantity, ...]
    ask: Callable[[RunSpec], Answers]


def fitcheck(spec: RunSpec) -> Answers:
    """fitcheck's total is the process's, its overhead what lies beside the tensors."""
    config = _module("fitcheck.config_parser").fetch_model_config(spec.model)
    estimator = _module("fitcheck.estimator")
    training = estimator.TrainingConfig(
        precision=spec.precision,
        quantization=spec.quantization,
        double_quant=spec.double_quant and spec.quantization == "nf4",
        optimizer=_FITCHECK_OPTIMIZERS.get(spec.optimizer, spec.optimizer),
        batch_size=spec.micro_batch_size,
        seq_len=spec.sequence_length,
        lora_rank=spec.lora.rank if spec.method == "lora" else None,
        lora_targets=_targets(spec),
        grad_checkpoint=spec.gradient_checkpointing,
        flash_attn=spec.attention != "eager",
        grad_accum_steps=spec.gradient_accumulation_steps,
    )
    card = _module("fitcheck.gpu_db").get_gpu(find_device(spec.device or "").id)
    report = estimator.estimate(config, training, card)
    total = round(report.total_mib * MIB)
    return {"allocated": total - round(report.overhead_mib * MIB), "device": total}


_FITCHECK_OPTIMIZERS = {
    "adamw_torch": "adamw", "adamw_torch_fused": "adamw", "adamw_8bit": "adam8bit",
    "adamw_bnb_8bit": "adam8bit",
}  # fmt: skip


def canifinetune(spec: RunSpec) -> Answers:
    """Its total holds shares of the card for CUDA and for safety; its parts are the rest."""
    estimator = _module("canifinetune.estimator.memory")
    quantized = spec.method == "lora" and spec.quantization != "none"
    scope, modules = _scope(spec)
    request = estimator.EstimateRequest(
        model_id=spec.model,
        method="full" if spec.method == "full" else "qlora" if quantized else "lora",
        quantization=_canifinetune_quantization(spec),
        base_dtype={"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}[spec.weights_dtype],
        seq_len=spec.sequence_length,
        micro_batch_size=spec.micro_batch_size,
        gradient_accumulation_steps=spec.gradient_accumulation_steps,
        lora_rank=spec.lora.rank,
        lora_target_scope=scope,
        target_modules=modules,
        optimizer=spec.optimizer,
        gradient_checkpointing=spec.gradient_checkpointing,
        attention_implementation=spec.attention,
        gpu_vram_gb=find_device(spec.device or "").total_bytes / GIB,
        use_network=False,
    )
    memory = estimator.estimate(request).memory
    beside = memory.cuda_overhead_gb + memory.safety_margin_gb
    total = memory.total_estimated_gb
    return {"allocated": round((total - beside) * GIB), "device": round(total * GIB)}


def _canifinetune_quantization(spec: RunSpec) -> str:
    if spec.quantization == "nf4":
        return "nf4_double_quant" if spec.double_quant else "nf4"
    return spec.quantization


def _scope(spec: RunSpec) -> tuple[str, list[str] | None]:
    """canifinetune's name for the target modules, or the modules themselves."""
    if spec.lora.target_modules == "all-linear":
        return "all_linear", None
    names = set(spec.lora.target_modules)
    if names == {"q_proj", "k_proj", "v_proj", "o_proj"}:
        return "attention", None
    if names == {"q_proj", "v_proj"}:
        return "conservative", None
    return "attention", list(spec.lora.target_modules)


def llm_analysis(spec: RunSpec) -> Answers:
    """Weights, gradients, optimizer states and activations of a training run."""
    if spec.method == "lora":
        raise NotOffered("no adapters: every parameter is trained")
    config, analysis = _module("llm_analysis.config"), _module("llm_analysis.analysis")
    logging.getLogger("__name__").setLevel(logging.ERROR)  # the name it gives itself
    card = config.GPUConfig("card", find_device(spec.device or "").total_bytes / GIB, 1.0, 1.0,
                            0.0, 1.0)  # fmt: skip
    made = analysis.LLMAnalysis(config.get_model_config_by_name(spec.model), card)
    parts = made.training(
        batch_size_per_gpu=spec.micro_batch_size,
        gradient_accumulation_steps=spec.gradient_accumulation_steps,
        seq_len=spec.sequence_length,
        total_num_tokens=spec.micro_batch_size * spec.sequence_length,
        activation_recomputation=analysis.ActivationRecomputation(
            2 if spec.gradient_checkpointing else 0
        ),
        flash_attn=spec.attention != "eager",
        mlp_gated_linear_units=True,
    )
    return {"device": round(parts["(weight+op_state+grad+act)_memory_per_gpu"])}


def accelerate(spec: RunSpec) -> Answers:
    """`accelerate estimate-memory`: "Total Size" of the dtype; "Training using Adam" for a full
    fine-tune. Its command asks the Hub for the model; its two formulas do not."""
    estimate = _module("accelerate.commands.estimate")
    total, _ = _module("accelerate.utils").calculate_maximum_sizes(
        _empty(spec.model, "float32", headless=True)
    )
    if spec.quantization != "none":
        return {"weights": total // (4 if spec.quantization == "int8" else 8)}
    wide = spec.weights_dtype == "float32"
    weights: Answers = {"weights": total if wide else total // 2}
    if spec.method == "lora":
        return weights
    precision = "float32" if spec.precision == "fp32" else "float16"
    return {**weights, "device": max(estimate.estimate_training_usage(total, precision).values())}


def transformers(spec: RunSpec) -> Answers:
    """`PreTrainedModel.get_memory_footprint`, of the model on the meta device."""
    if spec.quantization != "none":
        raise NotOffered("get_memory_footprint measures a loaded model: packed weights are only "
                         "made on a GPU")  # fmt: skip
    return {"weights": int(_empty(spec.model, spec.weights_dtype, headless=False)
                           .get_memory_footprint())}  # fmt: skip


def hf_mem(spec: RunSpec) -> Answers:
    """The sum over a safetensors header, here of the model's own tensors; for inference."""
    if spec.quantization != "none":
        raise NotOffered("it reads the checkpoint as stored: quantising at load is no option")
    dtype = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}[spec.weights_dtype]
    header = {
        f"{module.path}.{name}": {"dtype": dtype, "shape": list(shape)}
        for module in load_model(spec.model).tree.modules
        for name, shape in (module.shapes[1:] if module.tied_to else module.shapes)
    }
    metadata = _module("hf_mem.safetensors.metadata")
    return {"weights": int(metadata.parse_safetensors_metadata({"model": header}).bytes_count)}


@lru_cache(maxsize=1)
def _empty(name: str, dtype: str, headless: bool) -> Any:
    """The model on the meta device, from its config alone; without its output layer as accelerate
    builds it (`AutoModel`)."""
    import torch
    import transformers as hf
    from accelerate import init_empty_weights

    # Here and not above: huggingface_hub reads its environment once, at import.
    from probes.configs import config_for

    config = config_for(name)
    images = type(config) in hf.AutoModelForImageTextToText._model_mapping
    trained = hf.AutoModelForImageTextToText if images else hf.AutoModelForCausalLM
    with init_empty_weights():
        auto = hf.AutoModel if headless else trained
        model = auto.from_config(config, dtype=getattr(torch, DType(dtype).value))
    model.tie_weights()
    return model


def _targets(spec: RunSpec) -> list[str]:
    if spec.lora.target_modules != "all-linear":
        return list(spec.lora.target_modules)
    return ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def _module(name: str) -> Any:
    return importlib.import_module(name)


TOOLS = (
    Tool("fitcheck-llm", ("allocated", "device"), fitcheck),
    Tool("canifinetune", ("allocated", "device"), canifinetune),
    Tool("llm-analysis", ("device",), llm_analysis),
    Tool("accelerate", ("weights", "device"), accelerate),
    Tool("transformers", ("weights",), transformers),
    Tool("hf-mem", ("weights",), hf_mem),
)
