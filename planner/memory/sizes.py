"""Where torch itself branches on a size, and one program runs for many sizes at once."""

from __future__ import annotations

from typing import Any


class MixedSizesError(Exception):
    """The sizes of one vectorised run fall on both sides of a branch that torch takes.

    `truth` is the boolean array: run the program once for each side.
    """

    def __init__(self, truth: Any) -> None:
        super().__init__("sizes on both sides of a branch; evaluate them apart")
        self.truth = truth


def decide(truth: Any) -> bool:
    """A condition on a size as a bool; raises MixedSizesError where an array is of two minds."""
    if isinstance(truth, bool):
        return truth
    if truth.all():
        return True
    if truth.any():
        raise MixedSizesError(truth)
    return False
