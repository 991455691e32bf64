"""`vramwise fit`: will it fit, what fills the memory, how fast, what to change."""

from __future__ import annotations

import json
import sys

from planner.answer import Estimate
from planner.arguments import Arguments, Flag, parse_arguments
from planner.errors import UnsupportedError
from planner.estimate import estimate
from planner.spec import RunSpec

FLAGS = (
    Flag("max", "the largest micro_batch_size, sequence_length, lora.rank or images_per_sample "
         "that fits", "FIELD"),
    Flag("exact", "trace the real modelling code on the meta device (needs vramwise[train])"),
    Flag("trust-code", "with --exact: run the python files that a model's folder names"),
    Flag("model-class", "with --exact: path/to/file.py:Class or module:Class", "CLASS"),
    Flag("price-per-hour", "of the card: what the run costs", "PRICE"),
)  # fmt: skip


def run(arguments: list[str]) -> int:
    """Answer one run spec. Exit code 0: fits or tight; 1: does not fit."""
    given = parse_arguments("fit", arguments, FLAGS, description=str(__doc__))
    price = given.number("price_per_hour")
    spec = given.run_spec()
    if given.given.get("max"):
        return _largest(spec, given.given["max"], given.json)
    answer = _exact(spec, given) if given.given.get("exact") else estimate(spec)
    if given.json:
        values = answer.as_dict()
        values["run"] = _run_cost(answer, price)
        sys.stdout.write(json.dumps(values) + "\n")
    else:
        from planner.report.terminal import show
        from planner.report.text import fit_lines

        show(fit_lines(answer, price_per_hour=price))
        _show_levers(answer)
    return 1 if answer.verdict == "does_not_fit" else 0


def _run_cost(answer: Estimate, price: float | None) -> dict[str, object] | None:
    schedule = answer.spec.schedule
    if schedule.samples is None and schedule.max_steps is None:
        return None
    from planner.cost import run_cost

    return run_cost(answer, price)


def _show_levers(answer: Estimate) -> None:
    """After the verdict, which nobody should wait for: each lever is an answer of its own, by the
    planner's formulas, so a traced answer is not what they are compared with."""
    if answer.basis == "traced":
        try:
            answer = estimate(answer.spec)
        except UnsupportedError:  # a family that only the trace knows
            return
    from planner.levers import cheapest
    from planner.report.terminal import show
    from planner.report.text import lever_lines

    sys.stdout.flush()
    show(lever_lines(answer, cheapest(answer)))


def _largest(spec: RunSpec, field: str, as_json: bool) -> int:
    from planner.report.terminal import show
    from planner.report.text import largest_lines
    from planner.solver import largest

    found = largest(spec, field)
    if as_json:
        sys.stdout.write(json.dumps(found.as_dict()) + "\n")
    else:
        show(largest_lines(found))
    return 1 if found.value is None or found.answer is None else 0


def _exact(spec: RunSpec, given: Arguments) -> Estimate:
    from planner.verbs.exact import exact_estimate

    trusted, named = bool(given.given.get("trust_code")), given.given.get("model_class")
    return exact_estimate(spec, trust_code=trusted, model_class=named)
