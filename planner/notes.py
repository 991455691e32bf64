"""What the user should know beside the figures: one line each."""

from __future__ import annotations

from planner.devices import Device
from planner.interval import Interval
from planner.models.registry import Model
from planner.non_torch import NonTorch
from planner.spec import RunSpec


def notes(
    spec: RunSpec, model: Model, device: Device, outside: NonTorch, interval: Interval
) -> list[str]:
    """The lines that this answer needs."""
    told = []
    if not model.verified:
        told.append(f"{model.id}: its config could not be read at a source ({model.note})")
    positions = model.text.max_position_embeddings
    if spec.sequence_length > positions:
        told.append(
            f"sequence_length {spec.sequence_length} is beyond the model's {positions} positions"
        )
    if spec.precision == "bf16" and not device.supports_bf16:
        told.append(f"{device.label} has no bf16 units: use precision fp16")
    if spec.attention == "flash_attention_2" and not device.supports_flash_attention_2:
        told.append(f"{device.label} cannot run flash_attention_2: use sdpa")
    if spec.quantization == "int8" and not device.supports_int8_tensor:
        told.append(f"{device.label} cannot run bitsandbytes int8: use nf4")
    if spec.quantization == "int8" and spec.int8_outliers == "many":
        told.append("int8 keeps input columns with outliers: counted as for random weights, nearly "
                    "all of down_proj's; trained ones keep less (--int8-outliers few)")  # fmt: skip
    if spec.optimizer.startswith(("galore", "apollo")):
        told.append(f"{spec.optimizer}: rank 128 on every linear (optim_target_modules all-linear)")
    if spec.optimizer.startswith("galore"):
        told.append("GaLore's decomposition every 200 steps is in the memory, not in the time")
    if spec.optimizer in ("adamw_torch_4bit", "adamw_torch_8bit"):
        told.append("torchao updates in a compiled kernel: what it holds meanwhile is not counted")
    if spec.liger:
        told.append("liger is not modelled: these are the figures without it")
    if outside.status != "measured":
        told.append("memory outside torch's allocator is bounded, not measured, on this card")
    if spec.device is None and device.note:
        told.append(device.note)
    told.extend(interval.notes)
    return told
