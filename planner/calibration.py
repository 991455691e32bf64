"""What records taught: speeds and bands by device, shipped as data, or the user's own.

`vramwise calibrate` writes the file; the user's stands before the shipped one. A device, family or
version without records is carried over from those with, and its bands are wider.
"""

# Annotations stay objects here: named tuples would compile each string at import.
import json
import os
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from planner.errors import InputError, Problem

SHIPPED = Path(__file__).with_name("data") / "calibration.json"
# A band or spread where no record covers the device, the family or the versions: twice as wide.
WIDENING = 2.0


class Rates(NamedTuple):
    """How much of the datasheet a training step reaches, and the host's pace.

    matmul_share, bandwidth_share: of the peak rates; launch_s: host time a kernel;
    compiled_launch_s: one of the lean stack's, which go through generated Python and custom
    operators; hook_s: host time a tensor that a checkpointed region saves, three calls of Python;
    search_flops: fp32 operations, at peak, that an element of an 8-bit optimizer state is worth
    (bitsandbytes searches its code in a table). gpu_range, host_range: measured over predicted
    seconds, from the least to the most of the records that the one or the other bounds.
    """

    matmul_share: float
    bandwidth_share: float
    launch_s: float
    compiled_launch_s: float
    hook_s: float
    search_flops: float
    gpu_range: tuple[float, float]
    host_range: tuple[float, float]


class Band(NamedTuple):
    """Truth over prediction, less one: the lowest and highest seen on bisected records."""

    low: float
    high: float
    records: int


class Calibration(NamedTuple):
    """One device's records, learnt."""

    device: str
    rates: Rates
    bands: dict[str, Band]
    model_types: tuple[str, ...]
    versions: dict[str, str]
    records: int

    def as_dict(self) -> dict[str, Any]:
        bands = {key: band._asdict() for key, band in self.bands.items()}
        return {**self._asdict(), "rates": self.rates._asdict(), "bands": bands}


def band_key(stack: str, gradient_checkpointing: bool) -> str:
    """Configurations that leave the allocator alike: by stack and checkpointing."""
    return f"{stack}, {'checkpointed' if gradient_checkpointing else 'plain'}"


def covered_name(stack: str, model_type: str) -> str:
    """What stands in `model_types` for a family whose steps of a stack were measured."""
    return model_type if stack == "stock" else f"{stack} {model_type}"


def user_file() -> Path:
    """Where `vramwise calibrate` keeps what it learnt."""
    base = os.environ.get("XDG_CONFIG_HOME") or "~/.config"
    return Path(base).expanduser() / "vramwise" / "calibration.json"


def calibration_of(device_id: str) -> tuple[Calibration, bool]:
    """The calibration of a device, and whether it is its own (else the nearest: the shipped)."""
    known = _all()
    if device_id in known:
        return known[device_id], True
    return next(iter(known.values())), False


@lru_cache(maxsize=1)
def _all() -> dict[str, Calibration]:
    known = read(SHIPPED)
    user = user_file()
    return {**known, **(read(user) if user.is_file() else {})}


def forget() -> None:
    """Read the files again at the next question: they changed."""
    _all.cache_clear()


def read(path: Path) -> dict[str, Calibration]:
    """Calibrations of a file by device id; InputError where it is not one."""
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        return {entry["device"]: _entry(entry) for entry in entries}
    except (OSError, ValueError, KeyError, TypeError) as error:
        problem = f"is not a calibration file: {type(error).__name__}: {error}"
        raise InputError(Problem("calibration", problem, str(path))) from None


def _rates(gpu_range: list[float], host_range: list[float], **values: float) -> Rates:
    (a, b), (c, d) = gpu_range, host_range
    return Rates(**values, gpu_range=(a, b), host_range=(c, d))


def _entry(entry: dict[str, Any]) -> Calibration:
    return Calibration(
        device=entry["device"],
        rates=_rates(**entry["rates"]),
        bands={key: Band(**band) for key, band in entry["bands"].items()},
        model_types=tuple(entry["model_types"]),
        versions=entry["versions"],
        records=entry["records"],
    )
