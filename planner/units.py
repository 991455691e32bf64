"""Units. Everything inside is integer bytes, seconds and FLOPs; GiB exist only where text is read
or printed."""

from __future__ import annotations

import re

KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30

_SIZES = {
    "": 1, "B": 1,
    "KIB": KIB, "MIB": MIB, "GIB": GIB, "TIB": 1 << 40,
    "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
}  # fmt: skip
_PATTERN = re.compile(r"\s*([0-9]*\.?[0-9]+(?:[eE][+-]?[0-9]+)?)\s*([A-Za-z]*)\s*")


def parse_bytes(text: str) -> int:
    """'23.2GiB', '24 GB', '1073741824' -> integer bytes (decimal and binary units kept apart).

    Raises ValueError with what is allowed.
    """
    match = _PATTERN.fullmatch(text)
    unit = match.group(2).upper() if match else ""
    if not match or unit not in _SIZES:
        raise ValueError("a size is a number of bytes or a number with KiB, MiB, GiB, KB, MB or GB")
    number = float(match.group(1))
    if not unit and not number.is_integer():
        raise ValueError("a size in bytes is a whole number; a unit is GiB, MiB, GB, ...")
    if number > 1e30:
        raise ValueError("a size of more than 1e30 is none")
    return int(number * _SIZES[unit])


def format_gib(size_bytes: float, digits: int = 2) -> str:
    """Bytes -> '6.45 GiB'."""
    return f"{size_bytes / GIB:.{digits}f} GiB"


def format_seconds(seconds: float) -> str:
    """Seconds -> the shortest honest text: '256 ms', '1.42 s', '3.5 h'."""
    if seconds < 1:
        return f"{seconds * 1e3:.3g} ms"
    if seconds < 120:
        return f"{seconds:.3g} s"
    if seconds < 7200:
        return f"{seconds / 60:.3g} min"
    return f"{seconds / 3600:.3g} h" if seconds < 172_800 else f"{seconds / 86_400:.3g} days"
