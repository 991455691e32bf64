"""The verdict: the requirement's interval against what the card has."""

from __future__ import annotations

from typing import Literal

Verdict = Literal["fits", "tight", "does_not_fit"]


def verdict(low_bytes: int, high_bytes: int, total_bytes: int) -> Verdict:
    """fits: even the upper bound does; does_not_fit: not even the lower; tight: in between."""
    if high_bytes <= total_bytes:
        return "fits"
    return "does_not_fit" if low_bytes > total_bytes else "tight"
