"""The smallest cap under which a run completes, by bisection. Knows nothing of torch."""

from __future__ import annotations

import time
from collections.abc import Callable

from planner.units import MIB
from probes.records import Attempt, Capacity

# A bracket this narrow, absolute or relative to the passing cap, ends the search.
BRACKET_BYTES = 64 * MIB
BRACKET_RELATIVE = 0.01


def smallest_cap(
    attempt: Callable[[int], Attempt],
    low_bytes: int,
    high_bytes: int,
    confirm: Callable[[int], Attempt] | None = None,
    deadline: float | None = None,
) -> Capacity | None:
    """Bisect between `low_bytes` (peak allocated: less cannot pass) and `high_bytes` (peak
    reserved: passes, but is verified).

    `attempt(cap)` runs the steps from the clean state under the cap; `confirm(cap)`, where given,
    runs all of them, and the cap that it passes is the one reported. Returns None when even twice
    `high_bytes` fails, or the deadline (time.monotonic) came before any cap had passed.
    """
    started = time.monotonic()
    attempts: list[Attempt] = []

    def tried(run: Callable[[int], Attempt], cap: int) -> bool:
        attempts.append(run(cap))
        return attempts[-1].passed

    failed, passed = _first_bracket(lambda cap: tried(attempt, cap), low_bytes, high_bytes)
    if passed is None:
        return None
    while not _narrow(failed or low_bytes, passed) and not _late(deadline):
        middle = ((failed or low_bytes) + passed) // 2
        if tried(attempt, middle):
            passed = middle
        else:
            failed = middle
    while confirm is not None and not tried(confirm, passed):
        failed, passed = passed, passed + max(BRACKET_BYTES, int(passed * BRACKET_RELATIVE))
    return Capacity(
        failed_cap_bytes=failed,
        passed_cap_bytes=passed,
        attempts=tuple(attempts),
        seconds=time.monotonic() - started,
    )


def _first_bracket(
    passes: Callable[[int], bool], low: int, high: int
) -> tuple[int | None, int | None]:
    """(a cap that failed or None, a cap that passed or None). Tries `low` itself first when the
    bracket is narrow already: then the answer may be peak allocated exactly."""
    if _narrow(low, high) and passes(low):
        return None, low
    failed = low if _narrow(low, high) else None
    for cap in (high, high + high // 20, high * 2):
        if passes(cap):
            return failed, cap
        failed = cap
    return failed, None


def _narrow(failed: int, passed: int) -> bool:
    return passed - failed <= max(BRACKET_BYTES, int(passed * BRACKET_RELATIVE))


def _late(deadline: float | None) -> bool:
    return deadline is not None and time.monotonic() > deadline
