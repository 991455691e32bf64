"""`vramwise explain MODEL [TERM]`: any figure's formula with its numbers filled in.

With --bytes SIZE: the configurations of MODEL that land on a number someone quotes; the fields
given as flags stay as they are, the others are tried."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict

from planner.arguments import Arguments, Flag, parse_arguments
from planner.errors import InputError, Problem, nearest_name
from planner.estimate import device_of, estimate
from planner.memory.terms import Term
from planner.report.terminal import Line, show
from planner.units import format_gib, parse_bytes

FLAGS = (
    Flag("bytes", "list the configurations that land on this size", "SIZE"),
    Flag("within", "how near, as a share (0.03)", "SHARE"),
)


def run(arguments: list[str]) -> int:
    """Explain an answer, one of its terms, or a quoted number. Exit code 0."""
    given = parse_arguments("explain", arguments, FLAGS, ("MODEL", "TERM"), str(__doc__))
    if given.given.get("bytes"):
        return _quoted(given)
    spec = given.run_spec()
    answer = estimate(spec)
    from planner.formulas import explained, matching

    terms = explained(answer, device_of(spec))
    if len(given.positionals) > 1:
        wanted = given.positionals[1]
        found = matching(terms, wanted)
        if not found:
            names = [*dict.fromkeys(name for term in terms for name in (term.name, term.category))]
            raise InputError(Problem("TERM", "is no term of this answer", wanted,
                                     nearest=nearest_name(wanted, names)))  # fmt: skip
        terms = found
    if given.json:
        sys.stdout.write(json.dumps([asdict(term) for term in terms]) + "\n")
    else:
        show(line for term in terms for line in _term_lines(term))
    return 0


def _term_lines(term: Term) -> list[Line]:
    from planner.formulas import size_text

    size = f"  {size_text(term.bytes)}" if term.bytes or term.category != "figure" else ""
    return [
        Line(f"{term.name}{size}", "head"),
        Line(f"    = {term.formula}"),
        Line(f"    {term.category}, live: {term.instant}; source: {term.source}", "dim"),
    ]


def _quoted(given: Arguments) -> int:
    from planner.quoted import landings

    within = given.number("within")
    try:
        quoted = parse_bytes(given.given["bytes"])
    except ValueError as error:
        quoted = 0
        given.problems.append(Problem("--bytes", str(error), given.given["bytes"]))
    spec = given.run_spec()
    fixed = {path[0] for path in given.fields}
    found = landings(spec, quoted, within or 0.03, fixed)
    if given.json:
        rows = [{"flags": f.flags, "meter": f.meter, "bytes": f.bytes, "deviation": f.deviation}
                for f in found]  # fmt: skip
        sys.stdout.write(json.dumps(rows) + "\n")
        return 0
    show([Line(f"{len(found)} configuration(s) of {spec.model} land within "
               f"{within or 0.03:.0%} of {format_gib(quoted)}", "head")])  # fmt: skip
    show(
        Line(f"  {format_gib(f.bytes):>10} {f.deviation:+.1%}  {f.meter:<19} {f.flags}")
        for f in found
    )
    return 0
