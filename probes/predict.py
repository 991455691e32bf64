"""What the planner expects of a probe, where it can say."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from planner.errors import VramwiseError
from planner.spec import RunSpec

_NAMES = (
    "resident_bytes", "peak_allocated_bytes", "allocator_required_bytes", "load_peak_bytes",
    "eval_peak_bytes", "device_required_bytes", "device_required_interval_bytes", "step_seconds",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Target:
    """The card that the probe will run on, as the driver names it."""

    name: str
    total_bytes: int


@lru_cache(maxsize=4096)
def predict(spec: RunSpec, target: Target | None) -> dict[str, Any] | None:
    """The planner's numbers for `spec` on the card; None without a card, {"error"} where the
    planner has no answer: a sweep goes on without it, and the record says why."""
    if target is None:
        return None
    card = {"device": target.name, "device_memory": target.total_bytes}
    try:
        from planner.estimate import estimate

        answer = estimate(spec.model_copy(update=card))
    except VramwiseError as error:
        return {"error": str(error)}
    except Exception as error:
        # A bug of the planner must not cost a night's measuring; it is kept in the record.
        return {"error": f"{type(error).__name__}: {error}"[:300]}
    return {name: value for name in _NAMES if (value := getattr(answer, name, None)) is not None}


def cannot_fit(predicted: dict[str, Any] | None, target: Target | None) -> str | None:
    """Why the probe is skipped: even the lower end of what it needs passes the card."""
    if not predicted or target is None or "device_required_interval_bytes" not in predicted:
        return None
    low = predicted["device_required_interval_bytes"][0]
    if low <= target.total_bytes:
        return None
    return f"the planner expects at least {low} bytes; the card has {target.total_bytes}"
