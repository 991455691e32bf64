"""Liger's kernels, where Liger has a patch for the model's family."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from planner.errors import MissingExtraError, UnsupportedError, nearest_name


def apply_liger(model: PreTrainedModel, **switches: Any) -> None:
    """Patch a model's norms, MLP and rotary kernels in place. The loss stays this project's own.

    Raises UnsupportedError for a family without a patch (Chameleon is one), and MissingExtraError
    where Liger is not installed.
    """
    patches = liger_patches()
    family = model.config.model_type
    if family not in patches:
        near = nearest_name(family, patches)
        hint = f" (the nearest it has is {near})" if near else ""
        raise UnsupportedError(
            f"liger: Liger-Kernel has no patch for {family}{hint}; the lean stack's own chunked "
            "loss and compiled layers do what it would: set liger = false"
        )
    switches = {"cross_entropy": False, "fused_linear_cross_entropy": False, **switches}
    patches[family](model=model, **switches)


def liger_patches() -> dict[str, Any]:
    """Model type -> Liger's patch for it."""
    try:
        from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN
    except ImportError:
        raise MissingExtraError("train", "train", "liger-kernel") from None
    return dict(MODEL_TYPE_TO_APPLY_LIGER_FN)
