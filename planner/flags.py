"""argparse with the project's errors: one line, the nearest flag, exit code 2, no usage page."""

from __future__ import annotations

import argparse
from typing import NoReturn

from planner.errors import InputError, Problem, nearest_name


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that raises InputError, and takes no shortened flags."""

    def __init__(self, prog: str, description: str | None = None) -> None:
        super().__init__(prog=prog, description=description, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the usage."""
        near = None
        if message.startswith("unrecognized arguments:"):
            unknown = message.partition(":")[2].split()[0]
            flags = [flag for action in self._actions for flag in action.option_strings]
            near = nearest_name(unknown, flags)
        raise InputError(Problem("arguments", message, nearest=near))
