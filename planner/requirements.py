"""Requirement tables for write-ups: rows of methods, columns of cards or of batch sizes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from planner.devices import find_device
from planner.levers import apply
from planner.models.adapters import adapter_words
from planner.spec import RunSpec
from planner.sweep import Row, evaluate

METHODS: dict[str, dict[str, Any]] = {
    "full, AdamW": {"method": "full", "quantization": "none", "optimizer": "adamw_torch_fused"},
    "full, 8-bit AdamW": {"method": "full", "quantization": "none", "optimizer": "adamw_8bit"},
    "LoRA, 16 bits": {"method": "lora", "quantization": "none"},
    "LoRA, int8": {"method": "lora", "quantization": "int8"},
    "LoRA, nf4": {"method": "lora", "quantization": "nf4"},
}


@dataclass(frozen=True, slots=True)
class Requirements:
    """A table: `columns` are cards or batch sizes, `rows` a method each, with its cells."""

    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, tuple[Row, ...]], ...]


def requirements(
    spec: RunSpec, devices: Sequence[str] = (), batch_sizes: Sequence[int] = ()
) -> Requirements:
    """The table of `spec`'s model: columns are `devices`, or `batch_sizes` on the spec's device."""
    columns: list[tuple[str, dict[str, Any]]]
    if batch_sizes:
        columns = [(f"batch {size}", {"micro_batch_size": size}) for size in batch_sizes]
    else:
        columns = [(find_device(name).label, {"device": name, "device_memory": None})
                   for name in devices]  # fmt: skip
    rows = []
    for name, fields in METHODS.items():
        specs = [apply(apply(spec, fields), column) for _, column in columns]
        rows.append((name, tuple(evaluate(specs))))
    return Requirements(caption(spec, bool(batch_sizes)), tuple(c for c, _ in columns), tuple(rows))


def caption(spec: RunSpec, by_batch: bool) -> str:
    """The settings without which the figures mean nothing."""
    batch = "" if by_batch else f"micro batch {spec.micro_batch_size}, "
    where = f" on the {find_device(spec.device).label}" if by_batch and spec.device else ""
    return (
        f"Memory to fine-tune {spec.model}{where}: GiB that the card must have free (torch's "
        "caching allocator and what lies outside it), verdict and basis. "
        f"{batch}{shared_settings(spec)}."
    )


def shared_settings(spec: RunSpec) -> str:
    """Length, accumulation, adapter, checkpointing, precision, optimizer, stack, versions."""
    adapter = adapter_words(spec.model_copy(update={"method": "lora"})).replace(",", ", ")
    images = f", {spec.images_per_sample} image(s) a sample" if spec.images_per_sample else ""
    checkpointing = "with" if spec.gradient_checkpointing else "without"
    versions = spec.versions
    return (
        f"{spec.sequence_length} tokens a sample{images}, accumulation "
        f"{spec.gradient_accumulation_steps}, {adapter}, "
        f"{checkpointing} gradient checkpointing, autocast {spec.precision}, "
        f"{spec.optimizer} unless the row says otherwise, {spec.attention}, "
        f"{spec.stack} stack, torch {versions.torch}, transformers {versions.transformers}"
    )
