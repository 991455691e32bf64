"""Reading a config.json: typed look-ups that note every problem and tell them all at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from planner.errors import InputError, Problem

MAX_SIZE = 1 << 24  # no width, depth or vocabulary of a model that exists comes near
_REQUIRED: Any = object()


class Reader:
    """Looks keys up in one object of a config.json.

    where: dotted path of that object ("config.text_config"). A null value counts as absent, as it
    does for transformers. A bad key is noted, replaced by a harmless value so that the rest can be
    read, and told by `check()`.
    """

    def __init__(
        self, config: object, where: str = "config", problems: list[Problem] | None = None
    ) -> None:
        self.where = where
        self._problems: list[Problem] = [] if problems is None else problems
        if not isinstance(config, Mapping):
            self.reject(None, "is not a JSON object", config)
            config = {}
        self._config: Mapping[str, Any] = config

    def has(self, key: str) -> bool:
        """Is the key there, with a value other than null?"""
        return self._config.get(key) is not None

    def states(self, key: str) -> bool:
        """Is the key there at all, null or not?"""
        return key in self._config

    def raw(self, key: str, default: object = None) -> Any:
        value = self._config.get(key)
        return default if value is None else value

    def reject(
        self, key: str | None, message: str, received: object = None, allowed: str | None = None
    ) -> None:
        """Note a problem with `key` (None: with this object itself)."""
        field = self.where if key is None else f"{self.where}.{key}"
        self._problems.append(Problem(field, message, received, allowed))

    def size(
        self, key: str, default: int = _REQUIRED, *, low: int = 1, high: int = MAX_SIZE
    ) -> int:
        """An integer from `low` to `high`; required where no default is given."""
        value = self.raw(key, default)
        if value is _REQUIRED:
            self.reject(key, "is missing")
            return low
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            self.reject(key, "is not a size", value, f"an integer from {low:,} to {high:,}")
            return low
        return value

    def optional_size(self, key: str, default: int | None = None) -> int | None:
        return self.size(key) if self.has(key) else default

    def number(self, key: str, default: float, low: float = 0.0, high: float = 1e12) -> float:
        value = self.raw(key, default)
        if (
            not isinstance(value, int | float)
            or isinstance(value, bool)
            or not low <= value <= high
        ):
            self.reject(key, "is not a number in range", value, f"{low:g} to {high:g}")
            return default
        return float(value)

    def optional_number(self, key: str, default: float | None = None) -> float | None:
        """A positive number, or None where the key is null (absent: the default)."""
        if not self.states(key):
            return default
        return self.number(key, 1.0, low=1e-9) if self.has(key) else None

    def flag(self, key: str, default: bool) -> bool:
        value = self.raw(key, default)
        if not isinstance(value, bool):
            self.reject(key, "is not true or false", value)
            return default
        return value

    def text(self, key: str, default: str) -> str:
        value = self.raw(key, default)
        if not isinstance(value, str):
            self.reject(key, "is not a string", value)
            return default
        return value

    def sizes(self, key: str, default: Sequence[int]) -> tuple[int, ...]:
        """A list of positive integers, as long as a model could use (1,024)."""
        value = self.raw(key, list(default))
        good = isinstance(value, list) and len(value) <= 1024
        if not good or any(type(item) is not int or not 0 <= item <= MAX_SIZE for item in value):
            self.reject(key, "is not a list of sizes", value)
            return tuple(default)
        return tuple(value)

    def square(self, key: str, default: int) -> int:
        """An edge in pixels: an integer, or a pair of equal integers."""
        value = self.raw(key, default)
        if isinstance(value, list) and len(value) == 2 and value[0] == value[1]:
            return Reader({key: value[0]}, self.where, self._problems).size(key, high=1 << 16)
        return self.size(key, default, high=1 << 16)

    def inner(self, key: str, default: Mapping[str, Any] | None = None) -> Reader:
        """The reader of a nested object (absent: of `default`, or of an empty object)."""
        value = self.raw(key, default if default is not None else {})
        return Reader(value, f"{self.where}.{key}", self._problems)

    @property
    def sound(self) -> bool:
        """No problem noted so far: values can be held against each other."""
        return not self._problems

    def check(self) -> None:
        """Raise InputError with every problem noted so far."""
        if self._problems:
            raise InputError(self._problems)
