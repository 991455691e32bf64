"""Ask every installed tool about every measured row of the stock stack; see probes.others."""

from __future__ import annotations

import csv
import json
import os
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from planner.flags import Parser
from planner.meters import Meters, device_range, read_meters
from planner.models.registry import load_model
from planner.other_tools import FIELDS, ToolRow
from planner.residuals import Measured, read_measured
from probes.others.tools import TOOLS, Answers, NotOffered, Quantity, Tool


def main(argv: list[str]) -> int:
    """Write the table; tools that are not installed are told and left out."""
    parser = Parser(prog="python -m probes.others", description=__doc__)
    parser.add_argument("records", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(argv)
    measured = [row for row in read_measured(options.records) if row.spec.stack == "stock"]
    with tempfile.TemporaryDirectory() as cache:
        offline(Path(cache), {row.spec.model for row in measured})
        rows = list(ask_all(measured, read_meters(options.records), TOOLS))
    with options.out.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(row.as_dict() for row in rows)
    sys.stdout.write(f"wrote {len(rows)} answers to {options.out}\n")
    return 0


def offline(cache: Path, models: Iterable[str]) -> None:
    """A Hub cache with the catalogue's configs, so that tools read them as they always do."""
    for name in models:
        folder = cache / f"models--{name.replace('/', '--')}"
        snapshot = folder / "snapshots" / "catalogue"
        snapshot.mkdir(parents=True)
        config = json.dumps(dict(load_model(name).config))
        (snapshot / "config.json").write_text(config, encoding="utf-8")
        (folder / "refs").mkdir()
        (folder / "refs" / "main").write_text("catalogue", encoding="utf-8")
    os.environ.update(HF_HUB_CACHE=str(cache), HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1")


def ask_all(
    measured: list[Measured], meters: Mapping[str, Meters], tools: Iterable[Tool]
) -> Iterator[ToolRow]:
    """Answers and refusals, a row for each tool, record and quantity."""
    for tool in tools:
        try:
            release = version(tool.distribution)
        except PackageNotFoundError:
            sys.stderr.write(f"{tool.distribution} is not installed: left out\n")
            continue
        for row in measured:
            yield from _ask(tool, release, row, meters[row.key])


def _ask(tool: Tool, release: str, row: Measured, meters: Meters) -> Iterator[ToolRow]:
    answers: Answers = {}
    status, words = "answered", ""
    try:
        answers = tool.ask(row.spec)
    except NotOffered as reason:
        status, words = "not offered", str(reason)
    except ImportError:
        raise  # a package that the tool needs: nothing it says about the run
    except Exception as error:
        said = " ".join(f"{type(error).__name__}: {error}".split())
        status, words = "refused", _cut(said.partition(" [type=")[0])
    for quantity in tool.quantities:
        told, why = status, words
        if answers and quantity not in answers:
            told, why = "not offered", "no such figure for adapters or quantised weights"
        low, high = measured_range(row, meters, quantity)
        yield ToolRow(tool.distribution, release, row.key, row.spec.model, quantity, told,
                      answers.get(quantity), low, high, why)  # fmt: skip


def _cut(words: str) -> str:
    """At most 400 characters, whole sentences where there are some."""
    if len(words) <= 400:
        return words
    return words[:400].rpartition(". ")[0] or words[:400]


def measured_range(row: Measured, meters: Meters, quantity: Quantity) -> tuple[int, int]:
    """The measured figure that an estimate is held against, as (least, most) it can be."""
    if quantity == "device":
        found = device_range(row, meters)
        assert found is not None, f"{row.key} was not measured on a card"
        return found
    one = row.resident_bytes if quantity == "weights" else row.peak_allocated_bytes
    return one, one


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
