"""`vramwise ladder MODEL`: one lever a row, each on top of the one before, with its deltas.

The rungs climb from a full fine-tune in 16 bits; a spec file may list its own:
ladder = [{name = "4 bits", quantization = "nf4"}, {gradient_checkpointing = true}]
A model whose ladder was published (lavin-7b, lavin-13b) climbs that one, beside its figures and,
where results/ladder has rows, what was measured."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any

from planner.arguments import Arguments, Flag, parse_arguments
from planner.errors import InputError, Problem
from planner.estimate import device_of
from planner.ladder import Rung, climb, default_rungs, rungs_from
from planner.report.tables import RENDERERS
from planner.report.text import WORD
from planner.spec import RunSpec, spec_from_mapping
from planner.units import GIB
from planner.verbs.output import FORMAT_FLAGS, chosen_format, write_text

HEADER = ("change", "peak allocated", "allocator needs", "card needs", "saved", "tokens/s", "speed",
          "verdict")  # fmt: skip
MEASURED = Flag("measured", "JSON lines of recipes.lavin.measure, or a folder of them", "PATH")


def run(arguments: list[str]) -> int:
    """Print or write the ladder. Exit code 0."""
    flags = (*FORMAT_FLAGS, MEASURED)
    given = parse_arguments("ladder", arguments, flags, description=str(__doc__))
    values = given.values()
    listed = values.pop("ladder", None)
    kind = chosen_format(given)
    seeded = listed is None and _is_seeded(values)
    try:
        spec = spec_from_mapping(_with_base(values) if seeded else values)
    except InputError as error:
        raise InputError([*given.problems, *error.problems]) from None
    if given.given.get("measured") and not seeded:
        given.problems.append(Problem("--measured", f"{spec.model} has no published ladder"))
    given.check()
    device_of(spec)  # said before the first rung is evaluated
    if seeded:
        return _run_seed(given, kind, spec, values)
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


def _is_seeded(values: dict[str, Any]) -> bool:
    from planner.seed_ladder import seed_of

    model = values.get("model")
    return isinstance(model, str) and bool(model) and seed_of(model) is not None


def _with_base(values: dict[str, Any]) -> dict[str, Any]:
    from planner.seed_ladder import seed_base

    return seed_base(values["model"], values)


def _run_seed(given: Arguments, kind: str, spec: RunSpec, values: dict[str, Any]) -> int:
    from planner.measured_ladder import ladder_rows
    from planner.report.seed_ladder import HEADER as SEED_HEADER
    from planner.report.seed_ladder import seed_caption, seed_cells, seed_notes
    from planner.seed_ladder import climb_seed

    rungs = climb_seed(spec.model, values, ladder_rows(given.given.get("measured")))
    if given.json:
        sys.stdout.write(json.dumps([rung.as_dict() for rung in rungs]) + "\n")
        return 0
    rows: Sequence[Sequence[str]] = [seed_cells(rung) for rung in rungs]
    text = "".join(RENDERERS[kind](SEED_HEADER, rows, seed_caption(spec)))
    write_text(text + (seed_notes(rungs) if kind == "md" else ""), given)
    return 0
