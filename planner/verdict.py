"""The verdict: the requirement's interval against what the card has."""

from __future__ import annotations

from typing import Literal

Verdict = Literal["fits", "tight", "does_not_fit"]


_ORDER: tuple[Verdict, ...] = ("fits", "tight", "does_not_fit")


def worst(*verdicts: Verdict | None) -> Verdict:
    """Of several that must all hold; what is not known (None) does not count."""
    return max((v for v in verdicts if v is not None), key=_ORDER.index)


def verdict(low_bytes: int, high_bytes: int, total_bytes: int) -> Verdict:
    """fits: even the upper bound does; does_not_fit: not even the lower; tight: in between."""
    if high_bytes <= total_bytes:
        return "fits"
    return "does_not_fit" if low_bytes > total_bytes else "tight"
