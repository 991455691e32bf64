"""What the planner expects of a probe, where it can say."""

from __future__ import annotations

from typing import Any

from planner.errors import VramwiseError
from planner.spec import RunSpec


def predict(spec: RunSpec, device_total_bytes: int | None) -> dict[str, Any] | None:
    """The planner's numbers for `spec`, or None where it has no answer for it.

    device_total_bytes: the card that the probe will run on.
    """
    try:
        from planner.estimate import estimate
    except ImportError:
        return None
    memory = {"device_memory": device_total_bytes} if device_total_bytes else {}
    try:
        answer = estimate(spec.model_copy(update=memory))
    except VramwiseError:
        return None
    names = ("peak_allocated_bytes", "allocator_required_bytes", "device_required_bytes",
             "device_required_interval_bytes", "step_seconds", "resident_bytes")  # fmt: skip
    found = {name: getattr(answer, name, None) for name in names}
    return {name: value for name, value in found.items() if value is not None}


def cannot_fit(predicted: dict[str, Any] | None, device_total_bytes: int | None) -> str | None:
    """Why the probe is skipped: even the lower end of what it needs passes the card."""
    if not predicted or not device_total_bytes:
        return None
    interval = predicted.get("device_required_interval_bytes")
    low = interval[0] if interval else predicted.get("device_required_bytes")
    if low is None or low <= device_total_bytes:
        return None
    return f"the planner expects at least {low} bytes; the card has {device_total_bytes}"
