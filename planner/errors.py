"""The project's exceptions: one root, turned into one line and an exit code by the command line."""

# Annotations stay objects here: named tuples would compile each string at import.
from collections.abc import Iterable
from typing import NamedTuple


class VramwiseError(Exception):
    """Root of every error that is the user's to mend. Printed as one line, exit code 2."""

    exit_code = 2


class Problem(NamedTuple):
    """One thing wrong with the input.

    field: dotted path of the field ("lora.rank"); received: the value as given;
    message: what is wrong; allowed: what would be right; nearest: the closest known name.
    """

    field: str
    message: str
    received: object = None
    allowed: str | None = None
    nearest: str | None = None

    def __str__(self) -> str:
        text = f"{self.field}: {self.message}"
        if self.received is not None:
            text += f" (got {_short(self.received)})"
        if self.allowed:
            text += f"; allowed: {self.allowed}"
        if self.nearest:
            text += f"; did you mean {self.nearest!r}?"
        return text


class InputError(VramwiseError):
    """Bad input; carries every problem found at once, each on its own line."""

    def __init__(self, problems: Iterable[Problem] | Problem) -> None:
        self.problems = (problems,) if isinstance(problems, Problem) else tuple(problems)
        super().__init__("\n".join(str(problem) for problem in self.problems))


class UnsupportedError(VramwiseError):
    """The request is well formed but outside what is modelled. Never answered with a guess."""


class MissingExtraError(VramwiseError):
    """A verb needs an optional dependency. Says which extra to install."""

    def __init__(self, verb: str, extra: str, module: str) -> None:
        super().__init__(
            f"`vramwise {verb}` needs {module}, which is not installed: "
            f"pip install 'vramwise[{extra}]'"
        )


def nearest_name(name: str, known: Iterable[str]) -> str | None:
    """The known name closest to `name`, or None when nothing is close."""
    import difflib  # slow to load, and seldom needed

    by_folded = {candidate.lower(): candidate for candidate in known}
    matches = difflib.get_close_matches(name.lower(), by_folded, n=1, cutoff=0.5)
    return by_folded[matches[0]] if matches else None


def _short(value: object, limit: int = 80) -> str:
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 1] + "…"
