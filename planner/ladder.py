"""A ladder: one lever a rung, each on top of the one before, with what it saves and costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from planner.errors import InputError, Problem
from planner.levers import Change, apply
from planner.spec import RunSpec, spec_from_mapping
from planner.sweep import IMPOSSIBLE, Row, evaluate

START: dict[str, Any] = {
    "method": "full", "quantization": "none", "double_quant": False,
    "optimizer": "adamw_torch_fused", "gradient_checkpointing": False,
    "expandable_segments": False, "stack": "stock",
    "gradient_accumulation_steps": 1,
}  # fmt: skip
_LEAST_BATCH = 4  # where the first rung starts when the spec asks for less


@dataclass(frozen=True, slots=True)
class Rung:
    """One row. saved_bytes: of the device's requirement, against the rung below; faster: relative
    change of tokens a second against it. None on the first rung and beside impossible ones."""

    name: str
    flags: str
    spec: RunSpec
    row: Row
    saved_bytes: int | None
    faster: float | None

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        row = self.row._asdict()
        del row["values"]
        return {"rung": self.name, "flags": self.flags, "saved_bytes": self.saved_bytes,
                "faster": self.faster, **row}  # fmt: skip


def default_rungs(spec: RunSpec) -> list[tuple[str, Change]]:
    """From a plain full fine-tune in 16 bits to all that this project knows, one lever a rung."""
    whole = _whole_batch(spec)
    rungs: list[tuple[str, dict[str, Any]]] = [
        ("16 bits, full fine-tune", {**START, "micro_batch_size": whole}),
        ("8-bit AdamW", {"optimizer": "adamw_8bit"}),
        (f"LoRA r={spec.lora.rank}", {"method": "lora", "optimizer": "adamw_torch_fused"}),
        ("4 bits (nf4)", {"quantization": "nf4"}),
        ("double quantization", {"double_quant": True}),
        ("batch 1, accumulated", {"micro_batch_size": 1, "gradient_accumulation_steps": whole}),
        ("gradient checkpointing", {"gradient_checkpointing": True}),
        ("8-bit AdamW for adapters", {"optimizer": "adamw_8bit"}),
        ("paged 8-bit AdamW", {"optimizer": "paged_adamw_8bit"}),
        ("expandable segments", {"expandable_segments": True}),
        ("lean stack", {"stack": "lean"}),
    ]
    return [(name, Change(fields)) for name, fields in rungs]


def rungs_from(spec: RunSpec, listed: object) -> list[tuple[str, Change]]:
    """Rungs of a spec file: ladder = [{name = "...", field = value, "lora.rank" = 8}, ...], the
    first on top of the spec. Raises InputError for a bad field."""
    if not isinstance(listed, list) or not all(isinstance(rung, Mapping) for rung in listed):
        raise InputError(Problem("ladder", "is not a list of tables", listed))
    rungs, values = [("as given", Change({}))], spec.model_dump()
    for number, rung in enumerate(listed, start=1):
        fields = {name: value for name, value in rung.items() if name != "name"}
        for dotted, value in fields.items():
            outer, _, inner = dotted.partition(".")
            if inner:
                values[outer] = {**values.get(outer, {}), inner: value}
            else:
                values[outer] = value
        checked = spec_from_mapping(values)
        parsed = {dotted: _get(checked, dotted) for dotted in fields}
        change = Change(parsed)
        rungs.append((str(rung.get("name", change.flags or f"rung {number}")), change))
    return rungs


def climb(spec: RunSpec, rungs: Sequence[tuple[str, Change]]) -> list[Rung]:
    """Evaluate the rungs, each on top of those before; a rung that changes nothing is left out,
    and one that cannot be says why and is not built upon."""
    found: list[Rung] = []
    below = spec
    for name, change in rungs:
        current = apply(below, change.fields)
        if current == below and found:
            continue
        row = next(evaluate([current]))
        before = next(
            (rung.row for rung in reversed(found) if rung.row.verdict != IMPOSSIBLE), None
        )
        saved = faster = None
        if before is not None and row.verdict != IMPOSSIBLE:
            saved = int(before.device_required_bytes or 0) - int(row.device_required_bytes or 0)
            faster = (row.tokens_per_second or 0) / (before.tokens_per_second or 1) - 1
        found.append(Rung(name, change.flags, current, row, saved, faster))
        if row.verdict != IMPOSSIBLE:
            below = current
    return found


def _whole_batch(spec: RunSpec) -> int:
    return max(spec.micro_batch_size * spec.gradient_accumulation_steps, _LEAST_BATCH)


def _get(spec: RunSpec, dotted: str) -> Any:
    value: Any = spec
    for part in dotted.split("."):
        value = getattr(value, part)
    return value
