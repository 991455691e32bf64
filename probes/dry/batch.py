"""The reference batch: full-length samples, labels equal to the ids, image positions -100."""

from __future__ import annotations

import torch
from transformers import PretrainedConfig

from planner.spec import RunSpec
from probes.dry import values


def text_batch(spec: RunSpec, config: PretrainedConfig, rows: int) -> dict[str, torch.Tensor]:
    """input_ids and labels, int64 [rows, sequence_length], on meta with values."""
    length = spec.sequence_length
    ids = torch.full((rows, length), 5, dtype=torch.int64)
    return {"input_ids": _placed(ids), "labels": _placed(ids.clone())}


def _placed(tensor: torch.Tensor) -> torch.Tensor:
    return values.give(torch.empty_like(tensor, device="meta"), tensor)
