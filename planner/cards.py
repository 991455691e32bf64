"""Every card held against one spec: the step is run once, its requirement replayed once a kind of
cuBLAS workspace, and each card compared with it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from planner.cost import optimizer_steps
from planner.devices import Device, all_devices
from planner.estimate import Fit, Requirement, check, fit_on, requirement
from planner.memory.program import run
from planner.memory.workspace import cublas_workspace_bytes
from planner.models.registry import load_model
from planner.spec import RunSpec

_ORDER = {"fits": 0, "tight": 1, "does_not_fit": 2}


@dataclass(frozen=True, slots=True)
class CardRow:
    """One card's answer. cost_per_million_tokens and run_cost are in the prices' currency, None
    without a price (or, for the run, without a schedule)."""

    spec: RunSpec
    device: Device
    needed: Requirement
    fit: Fit
    price_per_hour: float | None
    cost_per_million_tokens: float | None
    run_hours: float | None
    run_cost: float | None

    @property
    def device_required_bytes(self) -> int:
        return self.needed.required_bytes + self.fit.outside.bytes

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        fit = self.fit
        return {
            "device": self.device.id,
            "name": self.device.label,
            "verdict": fit.verdict,
            "device_required_bytes": self.device_required_bytes,
            "device_required_interval_bytes": [fit.low_bytes, fit.high_bytes],
            "device_total_bytes": fit.total_bytes,
            "headroom_bytes": fit.total_bytes - fit.high_bytes,
            "step_seconds": fit.speed.step_s,
            "tokens_per_second": fit.tokens_per_second,
            "speed_basis": fit.speed.basis,
            "price_per_hour": self.price_per_hour,
            "cost_per_million_tokens": self.cost_per_million_tokens,
            "run_hours": self.run_hours,
            "run_cost": self.run_cost,
            "limits": list(relevant_limits(self.device, self.spec)),
            "verified": self.device.verified,
        }


def card_rows(
    spec: RunSpec, prices: Mapping[str, float] | None = None, devices: Iterable[Device] = ()
) -> list[CardRow]:
    """A row a card: those that fit first, the cheapest (or without prices the smallest) on top."""
    spec = spec.model_copy(update={"device_memory": None})  # each card has its own
    model = load_model(spec.model)
    check(spec, model)
    program = run(spec, model)
    needed: dict[int, Requirement] = {}
    rows = []
    for device in devices or all_devices():
        workspace = cublas_workspace_bytes(device.compute_capability)
        if workspace not in needed:
            needed[workspace] = requirement(spec, model, program, workspace)
        fit = fit_on(spec, device, program, needed[workspace])
        rows.append(_row(spec, device, needed[workspace], fit, (prices or {}).get(device.id)))
    return sorted(rows, key=_order)


def relevant_limits(device: Device, spec: RunSpec) -> tuple[str, ...]:
    """What the card cannot do of what the spec asks, each a clause."""
    asked = {
        "tensor cores": True,
        "bf16": spec.precision == "bf16",
        "int8": spec.quantization == "int8",
        "flash_attention_2": spec.attention == "flash_attention_2",
    }
    return tuple(text for text in device.limits if any(on and word in text
                 for word, on in asked.items()))  # fmt: skip


def _row(
    spec: RunSpec, device: Device, needed: Requirement, fit: Fit, price: float | None
) -> CardRow:
    steps = optimizer_steps(spec)
    hours = None if steps is None else steps * fit.speed.step_s / 3600
    million = None if price is None else price * 1e6 / fit.tokens_per_second / 3600
    cost = None if price is None or hours is None else price * hours
    return CardRow(spec, device, needed, fit, price, million, hours, cost)


def _order(row: CardRow) -> tuple[Any, ...]:
    """Verdict; then cost a token where there is a price; then memory, then speed."""
    priced = row.cost_per_million_tokens
    return (
        _ORDER[row.fit.verdict], priced is None, priced or 0.0, row.device.marketed_bytes,
        -row.fit.tokens_per_second, row.device.id,
    )  # fmt: skip
