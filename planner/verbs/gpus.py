"""`vramwise gpus MODEL`: every card with its verdict, speed and, given prices, cost."""

from __future__ import annotations

import json
import sys

from planner.arguments import Flag, parse_arguments
from planner.cards import CardRow, card_rows, relevant_limits
from planner.report.terminal import Line, show
from planner.report.text import WORD
from planner.units import GIB, format_seconds

FLAGS = (
    Flag("prices", "TOML of card = price an hour: what a million tokens and the run cost", "FILE"),
    Flag("fitting", "leave out the cards that it does not fit"),
)
_STYLE = {"fits": "good", "tight": "warn", "does_not_fit": "dim"}


def run(arguments: list[str]) -> int:
    """Print a row a card. Exit code 0: some card fits; 1: none."""
    given = parse_arguments("gpus", arguments, FLAGS, description=str(__doc__))
    spec = given.run_spec()
    prices = None
    if given.given.get("prices"):
        from planner.prices import read_prices

        prices = read_prices(given.given["prices"])
    rows = card_rows(spec, prices)
    fitting = [row for row in rows if row.fit.verdict != "does_not_fit"]
    shown = fitting if given.given.get("fitting") else rows
    if given.json:
        sys.stdout.write(json.dumps([row.as_dict() for row in shown]) + "\n")
    else:
        show([Line(summary(rows)), Line(), *gpus_lines(shown, priced=prices is not None)])
    return 0 if fitting else 1


def gpus_lines(rows: list[CardRow], priced: bool) -> list[Line]:
    """The rows as text."""
    head = f"{'card':<44}{'verdict':<14}{'needs':>8}{'has':>8}  {'tokens/s':>9}  {'step':>9}"
    lines = [Line(head + (f"{'per 1M tokens':>15}{'run':>10}" if priced else ""), "head")]
    for row in rows:
        fit = row.fit
        sizes = f"{row.device_required_bytes / GIB:>8.1f}{fit.total_bytes / GIB:>8.1f}"
        pace = f"{fit.tokens_per_second:>9,.0f}  {format_seconds(fit.speed.step_s):>9}"
        text = f"{row.device.label:<44}{WORD[fit.verdict]:<14}{sizes}  {pace}"
        if priced:
            text += f"{_money(row.cost_per_million_tokens):>15}{_money(row.run_cost):>10}"
        limits = "; ".join(relevant_limits(row.device, row.spec))
        lines.append(Line(f"{text}  {limits}".rstrip(), _STYLE[fit.verdict]))
    spread = max((row.fit.speed.slowest_s / row.fit.speed.step_s - 1 for row in rows), default=0.0)
    lines += [Line(), Line(f"GiB; speeds within about {spread:.0%} where no record of the card "
                           "was measured", "dim")]  # fmt: skip
    return lines


def summary(rows: list[CardRow]) -> str:
    """How many cards fit, and the smallest, fastest and cheapest of them."""
    fitting = [row for row in rows if row.fit.verdict == "fits"]
    if not fitting:
        return "No known card fits it."
    smallest = min(fitting, key=lambda row: row.fit.total_bytes)
    fastest = max(fitting, key=lambda row: row.fit.tokens_per_second)
    text = (f"{len(fitting)} of {len(rows)} cards fit it; the smallest is the "
            f"{smallest.device.label}, the fastest the {fastest.device.label}.")  # fmt: skip
    priced = [row for row in fitting if row.cost_per_million_tokens is not None]
    if priced:
        cheapest = min(priced, key=lambda row: row.cost_per_million_tokens or 0.0)
        text += f" The cheapest a token is the {cheapest.device.label}."
    return text


def _money(amount: float | None) -> str:
    return "-" if amount is None else f"{amount:,.3g}"
