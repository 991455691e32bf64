"""The real modelling code as referee: layers at full width, two deep, traced on the meta device.

The trace is the dry probe's. Under a dispatch mode torch's engine never adds gradients in place
(input_buffer.cpp), so each such addition is a second tensor for an instant, which a real run has
only where the first is a view: additions are left out here, and tested in test_engine.py.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PretrainedConfig

from planner.memory.program import Program, run
from planner.models.registry import Model, load_model, model_from_config
from planner.spec import RunSpec, spec_from_mapping
from probes.dry.events import Event, Trace
from probes.dry.trace import trace

LAYERS, VISION_LAYERS = 2, 2


def shortened(name: str, changes: dict[str, Any] | None = None) -> dict[str, Any]:
    """A catalogue model's config with two decoder layers and two or three vision layers."""
    config = json.loads(json.dumps(dict(load_model(name).config)))
    text = config.get("text_config", config)
    text["num_hidden_layers"] = LAYERS
    if "text_config" in config and "num_hidden_layers" in config:
        config["num_hidden_layers"] = LAYERS
    if text is config and "vision_config" in config:  # Qwen2-VL's published files are flat
        config["num_hidden_layers"] = LAYERS
    if "layer_types" in text:
        text["layer_types"] = text["layer_types"][:LAYERS]
    vision = config.get("vision_config")
    if vision is not None:
        flat = "depth" in vision or config["model_type"].startswith("qwen2")
        vision["depth" if flat else "num_hidden_layers"] = VISION_LAYERS + (not flat)
        if "fullatt_block_indexes" in vision:
            vision["fullatt_block_indexes"] = [1]
    text.update(changes or {})
    return config


def both(
    folder: Path, name: str, fields: dict[str, Any], changes: dict[str, Any] | None = None
) -> tuple[Trace, Program]:
    """The trace and the shadow program of one spec."""
    config = shortened(name, changes)
    spec = spec_from_mapping({"model": name, **fields})
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    real: PretrainedConfig = AutoConfig.from_pretrained(folder)
    traced = trace(spec, config=real)
    return traced, shadow(spec, model_from_config(config, name))


def shadow(spec: RunSpec, model: Model) -> Program:
    """The planner's own run."""
    return run(spec, model)


def traced_peaks(traced: Trace) -> dict[str, int]:
    """Live bytes at the peak of the last step's forward and backward, library workspace apart."""
    last = max(event.step for event in traced.events)
    live, peaks = traced.resident_bytes, {"forward": 0, "backward": 0}
    for event in traced.events:
        live += _change(event)
        phase = "backward" if event.phase == "recompute" else event.phase
        if event.step == last and phase in peaks and not _added_gradient(event):
            peaks[phase] = max(peaks[phase], live)
    return peaks


def planned_peaks(program: Program) -> dict[str, int]:
    """The same of the shadow program: its loss is part of the forward."""
    peaks = {"forward": 0, "backward": 0}
    for instant in program.recorder.instants:
        phase = "forward" if instant.name == "loss" else instant.name
        if phase in peaks:
            peaks[phase] = max(peaks[phase], program.static_bytes + instant.peak_bytes)
    return peaks


def traced_allocated(traced: Trace, floor_bytes: int) -> int:
    """Bytes allocated over the last step's forward and backward in tensors of `floor_bytes` up."""
    last = max(event.step for event in traced.events)
    return sum(
        event.size_bytes
        for event in traced.events
        if event.kind == "alloc" and event.step == last and event.size_bytes >= floor_bytes
        and event.phase in ("forward", "backward", "recompute") and not _added_gradient(event)
        and event.category != "workspace"
    )  # fmt: skip


def planned_allocated(program: Program, floor_bytes: int) -> int:
    """The same of the shadow program."""
    return sum(
        block.nbytes
        for block in program.recorder.blocks
        if block.nbytes >= floor_bytes and block.category != "inputs"
        and block.op != "add (gradients)"
        and not block.module.startswith(("clip", "optimizer"))
    )  # fmt: skip


def _change(event: Event) -> int:
    if event.category == "workspace":
        return 0
    if event.kind == "alloc":
        return event.size_bytes
    return -event.size_bytes if event.kind == "free" else 0


def _added_gradient(event: Event) -> bool:
    return event.phase == "backward" and event.op == "add"
