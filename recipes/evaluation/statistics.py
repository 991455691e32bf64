"""What a count of right answers allows one to say."""

from __future__ import annotations

import math
from collections.abc import Sequence


def wilson_interval(right: int, total: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's score interval of a proportion (E. B. Wilson, 1927); z = 1.96 is 95 %."""
    if total <= 0:
        raise ValueError("an interval needs at least one trial")
    p, spread = right / total, z * z / total
    centre = p + spread / 2
    half = z * math.sqrt(p * (1 - p) / total + spread / (4 * total))
    return max(0.0, (centre - half) / (1 + spread)), min(1.0, (centre + half) / (1 + spread))


def mcnemar_exact(first: Sequence[bool], second: Sequence[bool]) -> float:
    """Two-sided exact p-value that two raters of the same items differ only by chance: the
    binomial tail of the items where they disagree (McNemar, 1947, in its exact form)."""
    only_first = sum(a and not b for a, b in zip(first, second, strict=True))
    only_second = sum(b and not a for a, b in zip(first, second, strict=True))
    return binomial_two_sided(min(only_first, only_second), only_first + only_second)


def binomial_two_sided(fewer: int, total: int) -> float:
    """P(at most `fewer` heads, or as few tails, of `total` fair tosses)."""
    tail = sum(math.comb(total, k) for k in range(fewer + 1))
    return min(1.0, 2 * tail / 2**total)


def above_chance(right: int, total: int, chance: float = 0.25) -> float:
    """One-sided exact p-value of at least `right` of `total` by guessing."""
    return sum(
        math.comb(total, k) * chance**k * (1 - chance) ** (total - k)
        for k in range(right, total + 1)
    )
