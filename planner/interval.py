"""How sure the requirement is: a band from residuals of like configurations on held-out records."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from typing import Any, Literal

from planner.models.registry import Model
from planner.spec import RunSpec


@dataclass(frozen=True, slots=True)
class Interval:
    """[low, high] in bytes, where it comes from, and what to tell the user about it."""

    low_bytes: Any
    high_bytes: Any
    basis: Literal["measured", "calibrated", "traced", "analytic"]
    notes: tuple[str, ...] = ()


def requirement_interval(spec: RunSpec, model: Model, required_bytes: Any) -> Interval:
    """The band around `allocator_required_bytes`."""
    band = _bands().get(spec.stack, _bands()["analytic"])
    return Interval(
        _scaled(required_bytes, 1 + band["low"]), _scaled(required_bytes, 1 + band["high"]),
        band["basis"],
    )  # fmt: skip


def _scaled(size: Any, factor: float) -> Any:
    return int(size * factor) if isinstance(size, int) else (size * factor).astype("int64")


@lru_cache(maxsize=1)
def _bands() -> dict[str, Any]:
    text = files("planner").joinpath("data/intervals.json").read_text(encoding="utf-8")
    bands: dict[str, Any] = json.loads(text)
    return bands
