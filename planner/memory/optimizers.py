"""The optimizer of a name that `TrainingArguments.optim` takes."""

from __future__ import annotations

from planner.errors import UnsupportedError
from planner.memory.optimizer import TORCH, Optimizer, is_own

# Names that no CUDA card can run, or that transformers itself cannot make, and why.
REFUSED = {
    "adamw_torch_xla": "is torch_xla's syncfree AdamW, which runs on XLA devices, on no CUDA card",
    "adamw_torch_npu_fused": "is torch_npu's NpuFusedAdamW, which runs on Ascend NPUs, on no CUDA "
    "card",
    "galore_adafactor_layerwise": "cannot be made by transformers 5.17 (galore_torch: 'Cannot "
    "combine manual `lr` and `relative_step=True` options')",
}


def find_optimizer(name: str) -> Optimizer:
    """The optimizer of that name. UnsupportedError, with the reason, where no card can run it."""
    if is_own(name):
        return Optimizer(name)
    from planner.memory import low_rank, packaged  # loaded for their names alone

    rules = {**packaged.RULES, **low_rank.RULES}
    if name not in rules:
        why = REFUSED.get(name, "is not modelled")
        known = [*TORCH, "adafactor", *rules]
        raise UnsupportedError(
            f"optimizer: {name!r} {why}; allowed: {', '.join(known)} and the bitsandbytes names "
            "(adamw_8bit, paged_adamw_8bit, lion_8bit, ademamix, rmsprop_bnb, ...)"
        )
    return rules[name](name)
