"""`vramwise fit`: will it fit, what fills the memory, how fast, what to change."""

from __future__ import annotations

import json

from planner.arguments import spec_arguments
from planner.estimate import estimate


def run(arguments: list[str]) -> int:
    """Answer one run spec. Exit code 0: fits or tight; 1: does not fit."""
    spec, options = spec_arguments("fit", arguments)
    answer = estimate(spec)
    if options.json:
        print(json.dumps(answer.as_dict()))
    else:
        from planner.report.text import render_fit

        render_fit(answer)
    return 1 if answer.verdict == "does_not_fit" else 0
