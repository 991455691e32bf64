"""Words to the person running it: answers on standard output, progress on standard error."""

from __future__ import annotations

import sys


def out(text: str) -> None:
    """A line of the answer, flushed."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def note(text: str) -> None:
    """A line of progress, flushed."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()
