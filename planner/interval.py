"""How sure the requirement is: a band from the residuals of like configurations."""

# Annotations stay objects here: named tuples would compile each string at import.
from typing import Any, Literal, NamedTuple

from planner.calibration import WIDENING, Band, band_key, calibration_of, covered_name
from planner.models.registry import Model
from planner.spec import RunSpec
from planner.versions import release_line, version_notes

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
    unmodelled = version_notes(spec)
    key = band_key(spec.stack, spec.gradient_checkpointing)
    band = calibration.bands.get(key)
    covered = (
        band is not None
        and covered_name(spec.stack, model.model_type) in calibration.model_types
        and all(
            release_line(getattr(spec.versions, library)) == release_line(version)
            for library, version in calibration.versions.items()
        )
        and not unmodelled
    )
    if band is None:
        bands = calibration.bands.values()
        band = Band(min(b.low for b in bands), max(b.high for b in bands), 0)
    factor = 1.0 if covered else WIDENING
    return Interval(
        _scaled(required_bytes, 1 + factor * band.low),
        _scaled(required_bytes, 1 + factor * band.high),
        "calibrated" if covered else "analytic",
        unmodelled,
    )


def _scaled(size: Any, factor: float) -> Any:
    return int(size * factor) if isinstance(size, int) else (size * factor).astype("int64")
