"""The optimizer that `Trainer` would create, made to choose its kernels as on CUDA."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from transformers import Trainer, TrainingArguments
from transformers.trainer_pt_utils import get_parameter_names

from planner.spec import RunSpec

_FORBIDDEN = [r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)"]


def create_optimizer(spec: RunSpec, model: torch.nn.Module) -> torch.optim.Optimizer:
    """Class and settings by transformers' own table, parameters in its two groups."""
    arguments = TrainingArguments(output_dir="unused", optim=spec.optimizer, use_cpu=True, report_to=[])
    cls, kwargs = Trainer.get_optimizer_cls_and_kwargs(arguments, model)
    decayed = set(get_parameter_names(model, [torch.nn.LayerNorm], _FORBIDDEN))
    trainable = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for n, p in trainable if n in decayed], "weight_decay": 0.0},
        {"params": [p for n, p in trainable if n not in decayed], "weight_decay": 0.0},
    ]
    return cls(groups, **kwargs)


@contextmanager
def cuda_defaults() -> Iterator[None]:
    """torch's foreach and fused kernels exist for CUDA, not for meta: say that they do."""
    names: list[Any] = ["meta", "cuda", "cpu"]
    with (
        mock.patch(
            "torch.utils._foreach_utils._get_foreach_kernels_supported_devices", lambda: names
        ),
        mock.patch(
            "torch.utils._foreach_utils._get_fused_kernels_supported_devices", lambda: names
        ),
        mock.patch(
            "torch.optim.optimizer._get_foreach_kernels_supported_devices", lambda: names
        ),
        mock.patch("torch.optim.optimizer._get_fused_kernels_supported_devices", lambda: names),
    ):
        yield
