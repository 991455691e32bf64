"""Which adapter a run trains, in words."""

from __future__ import annotations

from planner.models.registry import load_model
from planner.spec import RunSpec


def adapter_words(spec: RunSpec) -> str:
    """'LoRA r=16 on all-linear', 'full', or the name of the model's own adapter."""
    if spec.method == "full":
        return "full"
    own = getattr(load_model(spec.model).family, "ADAPTER", None)
    if own is not None:
        return str(own)
    if spec.adapter == "adaption_prompt":
        prompt = spec.adaption_prompt
        return f"LLaMA-Adapter, {prompt.adapter_len} prompts in {prompt.adapter_layers} layers"
    names = spec.lora.target_modules
    targets = names if isinstance(names, str) else ",".join(names)
    return f"LoRA r={spec.lora.rank} on {targets}"
