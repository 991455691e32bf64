"""What the verbs that print tables share: the format, and where it goes."""

from __future__ import annotations

import sys
from pathlib import Path

from planner.arguments import Arguments, Flag
from planner.errors import Problem
from planner.report.tables import RENDERERS

FORMAT_FLAGS = (
    Flag("format", f"{', '.join(RENDERERS)} (default: the suffix of --out, else md)", "FORMAT"),
    Flag("out", "a file to write instead of standard output", "FILE"),
)


def chosen_format(given: Arguments) -> str:
    """The renderer's name; a problem is noted where there is none of that name."""
    out = given.given.get("out")
    suffix = Path(out).suffix.lower().removeprefix(".") if out else "md"
    kind = given.given.get("format") or suffix
    if kind not in RENDERERS:
        name = "--format" if given.given.get("format") else "--out"
        given.problems.append(Problem(name, "is not a format", kind, ", ".join(RENDERERS)))
        return "md"
    if out and not Path(out).parent.is_dir():
        given.problems.append(Problem("--out", "is in no folder that exists", out))
    return str(kind)


def write_text(text: str, given: Arguments) -> None:
    """To --out, or to standard output."""
    if given.given.get("out"):
        Path(given.given["out"]).write_text(text, encoding="utf-8")
    else:
        sys.stdout.write(text)
