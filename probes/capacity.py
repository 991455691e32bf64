"""The smallest cap under which a run completes, by bisection. Knows nothing of torch."""

from __future__ import annotations

import time
from collections.abc import Callable

from planner.units import MIB
from probes.records import Attempt, Capacity

# A bracket this narrow, absolute or relative to the passing cap, ends the search.
BRACKET_BYTES = 64 * MIB
BRACKET_RELATIVE = 0.01
# Times that the confirmation may move the bracket up: each by the bracket's width.
_CONFIRMATIONS = 20


def smallest_cap(
    attempt: Callable[[int], Attempt],
    low_bytes: int,
    high_bytes: int,
    confirm: Callable[[int], Attempt] | None = None,
    deadline: float | None = None,
) -> Capacity | None:
    """Bisect between `low_bytes` (peak allocated: less cannot pass) and `high_bytes` (peak
    reserved: a run without a cap took no more).

    `attempt(cap)` runs some steps from the clean state under the cap; `confirm(cap)`, where given,
    runs all of them, and only a cap that it passes is reported. Returns None when no cap a little
    above `high_bytes` passes either, or when the deadline (time.monotonic) comes first.
    """
    started = time.monotonic()
    attempts: list[Attempt] = []

    def tried(run: Callable[[int], Attempt], cap: int) -> bool:
        attempts.append(run(cap))
        return attempts[-1].passed

    failed, passed = None, high_bytes
    if is_narrow(low_bytes, high_bytes):
        failed, passed = (None, low_bytes) if tried(attempt, low_bytes) else (low_bytes, high_bytes)
    while not is_narrow(failed or low_bytes, passed):
        if deadline is not None and time.monotonic() > deadline:
            return None
        middle = ((failed or low_bytes) + passed) // 2
        if tried(attempt, middle):
            passed = middle
        else:
            failed = middle
    confirm = confirm or attempt
    for _ in range(_CONFIRMATIONS):
        if tried(confirm, passed):
            break
        failed, passed = passed, passed + max(BRACKET_BYTES, int(passed * BRACKET_RELATIVE))
    else:
        return None
    return Capacity(
        failed_cap_bytes=failed,
        passed_cap_bytes=passed,
        attempts=tuple(attempts),
        seconds=time.monotonic() - started,
    )


def around(
    attempt: Callable[[int], Attempt], guess_bytes: int, low_bytes: int,
    high_bytes: int | None = None, most: int = 12,
) -> Capacity | None:  # fmt: skip
    """The same bracket, from a guess outwards: two tries where the guess is right, for tries that
    are dear. `low_bytes` cannot pass; `high_bytes`, where it is known, has passed. None where
    `most` tries did not narrow it.
    """
    started = time.monotonic()
    attempts: list[Attempt] = []
    failed, passed = low_bytes, high_bytes
    cap = max(guess_bytes, low_bytes) if passed is None else min(guess_bytes, passed)
    stride = max(BRACKET_BYTES, int(cap * BRACKET_RELATIVE))
    while passed is None or not is_narrow(failed, passed):
        if len(attempts) == most:
            return None
        attempts.append(attempt(cap))
        if attempts[-1].passed:
            passed = cap
        else:
            failed = cap
        if len({tried.passed for tried in attempts}) == 2 and passed is not None:
            cap = (failed + passed) // 2
        elif attempts[-1].passed:
            cap = max(failed, cap - stride)
        else:
            cap = cap + stride if passed is None else min(passed, cap + stride)
        stride *= 2
    return Capacity(
        failed_cap_bytes=failed if any(not tried.passed for tried in attempts) else None,
        passed_cap_bytes=passed, attempts=tuple(attempts), seconds=time.monotonic() - started,
    )  # fmt: skip


def is_narrow(failed: int, passed: int, slack: float = 1.0) -> bool:
    """The bracket says enough: 64 MiB or 1 % wide at most, times `slack`."""
    return passed - failed <= slack * max(BRACKET_BYTES, int(passed * BRACKET_RELATIVE))
