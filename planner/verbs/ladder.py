"""`vramwise ladder MODEL`: one lever a row, each on top of the one before, with its deltas.

The rungs climb from a full fine-tune in 16 bits; a spec file may list its own:
ladder = [{name = "4 bits", quantization = "nf4"}, {gradient_checkpointing = true}]"""

from __future__ import annotations

import json
import sys

from planner.arguments import parse_arguments
from planner.errors import InputError
from planner.estimate import device_of
from planner.ladder import Rung, climb, default_rungs, rungs_from
from planner.report.tables import RENDERERS
from planner.report.text import WORD
from planner.spec import RunSpec, spec_from_mapping
from planner.units import GIB
from planner.verbs.output import FORMAT_FLAGS, chosen_format, write_text

HEADER = ("change", "peak allocated", "allocator needs", "card needs", "saved", "tokens/s", "speed",
          "verdict")  # fmt: skip


def run(arguments: list[str]) -> int:
    """Print or write the ladder. Exit code 0."""
    given = parse_arguments("ladder", arguments, FORMAT_FLAGS, description=str(__doc__))
    values = given.values()
    listed = values.pop("ladder", None)
    kind = chosen_format(given)
    try:
        spec = spec_from_mapping(values)
    except InputError as error:
        raise InputError([*given.problems, *error.problems]) from None
    given.check()
    device_of(spec)  # said before the first rung is evaluated
    rungs = climb(spec, default_rungs(spec) if listed is None else rungs_from(spec, listed))
    if given.json:
        sys.stdout.write(json.dumps([rung.as_dict() for rung in rungs]) + "\n")
        return 0
    text = "".join(RENDERERS[kind](HEADER, [cells(rung) for rung in rungs], caption(spec)))
    write_text(text, given)
    return 0


def cells(rung: Rung) -> list[str]:
    """A rung as the table's cells, sizes in GiB."""
    row = rung.row
    if row.peak_allocated_bytes is None:
        return [rung.name, *[""] * 6, f"impossible: {row.reason}"]
    sizes = (row.peak_allocated_bytes, row.allocator_required_bytes, row.device_required_bytes)
    return [
        rung.name,
        *(f"{(size or 0) / GIB:.2f}" for size in sizes),
        "" if rung.saved_bytes is None else f"{rung.saved_bytes / GIB:+.2f}",
        f"{row.tokens_per_second:,.0f}",
        "" if rung.faster is None else f"{rung.faster:+.0%}",
        f"{WORD[row.verdict]} ({row.basis})",
    ]


def caption(spec: RunSpec) -> str:
    """The settings that the rungs share."""
    from planner.requirements import shared_settings

    return (
        f"{spec.model} on the {device_of(spec).label}: one change a row, each on top of the row "
        f"above; sizes in GiB; {shared_settings(spec)}"
    )
