"""Tiny models and specs that the probes' tests share."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig

from planner.spec import RunSpec, spec_from_mapping
from probes.configs import config_for


def spec(**fields: Any) -> RunSpec:
    """A spec of the tiny Chameleon, 2 x 32 tokens; dotted names with two underscores."""
    values: dict[str, Any] = {
        "model": "facebook/chameleon-7b",
        "optimizer": "adamw_torch",
        "micro_batch_size": 2,
        "sequence_length": 32,
        **fields,
    }
    return spec_from_mapping(values)


def config() -> PretrainedConfig:
    """The Chameleon family at a CPU's size."""
    return config_for("facebook/chameleon-7b", tiny=True)
