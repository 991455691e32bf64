"""Lines of text to standard output: the same bytes into every pipe, colours on a terminal alone."""

# Annotations stay objects here: named tuples would compile each string at import.
import sys
from collections.abc import Iterable
from typing import NamedTuple

BAR, BAR_ASCII = "█", "#"


class Line(NamedTuple):
    """A line and how a terminal shows it: "good", "bad", "warn", "dim", "head" or plainly."""

    text: str = ""
    style: str = ""


_STYLES = {
    "good": "bold green", "bad": "bold red", "warn": "bold yellow", "dim": "dim", "head": "bold",
}  # fmt: skip


def show(lines: Iterable[Line]) -> None:
    """Print lines. rich is imported for a terminal only: it would cost a fifth of the answer."""
    if not sys.stdout.isatty():
        sys.stdout.write("".join(f"{_encodable(line.text)}\n" for line in lines))
        return
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False, soft_wrap=True)
    for line in lines:
        console.print(Text(_encodable(line.text), style=_STYLES.get(line.style, "")))


def bar(share: float, width: int = 24) -> str:
    """A bar of `share` of `width` characters; something where there is anything."""
    if share <= 0:
        return ""
    return BAR * max(1, round(share * width))


def _encodable(text: str) -> str:
    """Bars of # where the output's encoding has no block."""
    encoding = sys.stdout.encoding or "ascii"
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        return text.replace(BAR, BAR_ASCII).encode(encoding, "replace").decode(encoding)
    return text
