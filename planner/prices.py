"""Prices an hour, from the user's own TOML file. None are shipped: they change by the week.

"rtx-3090" = 0.22
"a100-80gb-sxm" = 1.19
"""

from __future__ import annotations

import math
import tomllib
from pathlib import Path

from planner.devices import find_device
from planner.errors import InputError, Problem


def read_prices(path: str) -> dict[str, float]:
    """TOML of device = price an hour -> {device id: price}, in the file's own currency.

    Raises InputError naming every bad entry: an unknown device, a price that is not positive.
    """
    file = Path(path)
    if not file.is_file():
        raise InputError(Problem("prices", "no such file", path, "a .toml file"))
    try:
        values = tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InputError(Problem("prices", f"cannot be read: {error}", path)) from None
    prices: dict[str, float] = {}
    problems: list[Problem] = []
    for name, price in values.items():
        try:
            device = find_device(name).id
        except InputError as error:
            problems += error.problems
            continue
        if isinstance(price, bool) or not isinstance(price, int | float) or not 0 < price < 1e6:
            problems.append(Problem(f"prices.{name}", "is not a price an hour", price, "above 0"))
        elif math.isclose(prices.setdefault(device, float(price)), price):
            continue
        else:
            problems.append(Problem(f"prices.{name}", f"prices {device} a second time", price))
    if problems:
        raise InputError(problems)
    return prices
