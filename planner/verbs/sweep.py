"""`vramwise sweep GRID.toml --out FILE`: every combination of a grid, each with what `fit` says.

Fields of the run spec stand at the top of GRID.toml, lists of values under [grid]; flags set fields
as they do for `fit`. FILE: .csv, .json, .md, .tex or .parquet. Rows of a model and card that no
other beats in both memory and speed are marked (pareto)."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

from planner.arguments import Flag, parse_arguments
from planner.errors import InputError, Problem
from planner.spec import read_mapping
from planner.sweep import evaluate_grid
from planner.sweep_grid import grid_from_mapping
from planner.sweep_write import output_format, write_sweep

FLAGS = (
    Flag("out", "where the table goes: .csv, .json, .md, .tex or .parquet", "FILE"),
    Flag("quiet", "no progress"),
)


def run(arguments: list[str]) -> int:
    """Evaluate the grid and write it. Exit code 0."""
    given = parse_arguments("sweep", arguments, FLAGS, ("GRID.toml",), str(__doc__))
    out = str(given.given.get("out") or "")
    if not given.positionals:
        given.problems.append(Problem("GRID.toml", "is required"))
    if not out:
        given.problems.append(Problem("--out", "is required", allowed="a file to write"))
    given.check()
    output_format(out)
    mapping = {**read_mapping(given.positionals[0]), **given.values()}
    if "grid" not in mapping:
        raise InputError(Problem("grid", "is required: a table of lists", given.positionals[0]))
    grid = grid_from_mapping(mapping)
    quiet = bool(given.given.get("quiet")) or not sys.stderr.isatty()
    started = time.monotonic()
    names = [axis.name for axis in grid.axes]
    base = grid.base.model_dump(mode="json")
    count = write_sweep(out, names, evaluate_grid(grid), base,
                        (lambda _: None) if quiet else _progress(grid.size))  # fmt: skip
    seconds = time.monotonic() - started
    sys.stderr.write(f"{count:,} rows in {seconds:.1f} s: {out}\n")
    return 0


def _progress(total: int) -> Callable[[int], None]:
    started = told = time.monotonic()

    def tell(count: int) -> None:
        nonlocal told
        now = time.monotonic()
        if now - told >= 0.5 or count == total:
            told = now
            rate = count / max(now - started, 1e-9)
            end = "\n" if count == total else ""
            sys.stderr.write(f"\r{count:,} of {total:,} ({rate:,.0f}/s){end}")

    return tell
