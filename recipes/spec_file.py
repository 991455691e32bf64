"""A run's spec as it lies on disk, with its data beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from planner.spec import read_mapping


def read_spec(source: str, shipped: Path) -> dict[str, Any]:
    """A file, "-", or the name of a configuration in the folder `shipped`. A relative data path
    that is there beside the file starts at it."""
    named = shipped / f"{source}.toml"
    path = named if named.is_file() and not Path(source).exists() else Path(source)
    values = read_mapping(source if source == "-" else str(path))
    for table in ("data", "evaluation"):
        if isinstance(values.get(table), dict) and isinstance(values[table].get("source"), str):
            beside = path.parent / values[table]["source"]
            if source != "-" and beside.exists():
                values[table]["source"] = str(beside)
    return values
