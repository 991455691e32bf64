"""How sure the requirement is: a band from the residuals of like configurations."""

# Annotations stay objects here: named tuples would compile each string at import.
from typing import Any, Literal, NamedTuple

from planner.calibration import WIDENING, Band, band_key, calibration_of
from planner.models.registry import Model
from planner.spec import RunSpec

Basis = Literal["measured", "calibrated", "traced", "analytic"]


class Interval(NamedTuple):
    """[low, high] in bytes, where it comes from, and what to tell the user about it."""

    low_bytes: Any
    high_bytes: Any
    basis: Basis
    notes: tuple[str, ...] = ()


def requirement_interval(
    spec: RunSpec, model: Model, required_bytes: Any, device_id: str | None = None
) -> Interval:
    """The band around `allocator_required_bytes`: "calibrated" where records cover the stack, the
    model's family and the versions, else "analytic" and wider. The allocator is the same on every
    card, so the card does not widen it."""
    calibration, _ = calibration_of(device_id or "h200")
    band = calibration.bands.get(band_key(spec.stack, spec.gradient_checkpointing))
    covered = (
        band is not None
        and model.model_type in calibration.model_types
        and _minor(spec.versions.torch) == _minor(calibration.versions["torch"])
        and _minor(spec.versions.transformers) == _minor(calibration.versions["transformers"])
    )
    if band is None:
        bands = calibration.bands.values()
        band = Band(min(b.low for b in bands), max(b.high for b in bands), 0)
    factor = 1.0 if covered else WIDENING
    return Interval(
        _scaled(required_bytes, 1 + factor * band.low),
        _scaled(required_bytes, 1 + factor * band.high),
        "calibrated" if covered else "analytic",
    )


def _minor(version: str) -> str:
    return ".".join(version.split("+")[0].split(".")[:2])


def _scaled(size: Any, factor: float) -> Any:
    return int(size * factor) if isinstance(size, int) else (size * factor).astype("int64")
