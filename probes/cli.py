"""`vramwise probe`: measure real steps of a spec or of a grid, on a GPU or tiny on the CPU."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from planner.errors import InputError, Problem, VramwiseError
from planner.flags import Parser
from probes.claims import Ledger
from probes.driver import Card, find_cards, refuse_if_busy
from probes.grid import Campaign, read_campaign
from probes.order import Group, arrange, in_order, split
from probes.progress import Progress, describe
from probes.store import StoreError, device_folder, read
from probes.sweep import Settings, Sweep, cpu_lane, lanes_for

_DEFAULT_STORE = Path("results/records")
_LARGEST_GROUP = 20


def run(argv: list[str]) -> int:
    """Entry point of `vramwise probe`. 0: every probe has an outcome, or the budget is spent."""
    if "--dry" in argv:
        from probes.dry.cli import run as run_dry

        return run_dry([argument for argument in argv if argument != "--dry"])
    arguments = _parser().parse_args(argv)
    campaigns = [read_campaign(source, _overrides(arguments)) for source in arguments.spec]
    if arguments.cpu:
        return _sweep(arguments, campaigns, None)
    cards = find_cards()
    if not cards:
        return _explain(campaigns)
    return _sweep(arguments, campaigns, _chosen(cards, arguments))


def _parser() -> Parser:
    parser = Parser(
        prog="vramwise probe",
        description="Run real training steps and record their memory and speed.",
    )
    parser.add_argument("spec", nargs="+",
                        help="run specs, or grids of them (TOML or JSON), - for stdin")  # fmt: skip
    parser.add_argument("--dry", action="store_true", help="trace on the meta device, no GPU")
    parser.add_argument("--cpu", action="store_true", help="the same code on tiny models, no GPU")
    parser.add_argument("--gpus", help="cards to use, side by side: 0,1 (default: all)")
    parser.add_argument("--bisect", action="store_true", help="find the smallest allocator cap")
    parser.add_argument("--saved-tensors", action="store_true", help="count what autograd keeps")
    parser.add_argument("--steps", type=int, help="optimizer steps a probe runs")
    parser.add_argument("--warmup-steps", type=int, help="of these, steps that are not timed")
    parser.add_argument("--weights", help='"random" (default) or a checkpoint folder')
    parser.add_argument("--repeat", type=int, help="a number that makes this a probe of its own")
    parser.add_argument("--store", type=Path, default=_DEFAULT_STORE, help="where records go")
    parser.add_argument("--also", type=Path, action="append", default=[],
                        help="another store, whose records of this device count")  # fmt: skip
    parser.add_argument("--retry", default="", help="outcomes to measure again: crash,timeout")
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds a probe may take")
    parser.add_argument("--load-timeout", type=float, default=300.0, help="seconds a load may take")
    parser.add_argument("--share-loads", action="store_true",
                        help="several shapes a process, twice as fast: allocated bytes are those "
                             "of a fresh one, reserved ones may differ")  # fmt: skip
    parser.add_argument("--budget-seconds", type=float, help="start no probe after this time")
    parser.add_argument("--snapshots", type=Path,
                        help="a folder for memory snapshots that torch's viewer opens")  # fmt: skip
    parser.add_argument("--log", type=Path, help="what the children print (default: in the store)")
    parser.add_argument("--force", action="store_true", help="measure beside another tenant's load")
    parser.add_argument("--no-skip", action="store_true",
                        help="measure what the planner says cannot fit, too")  # fmt: skip
    return parser


def _overrides(arguments: argparse.Namespace) -> dict[str, Any]:
    names = ("steps", "warmup_steps", "weights", "repeat")
    given = {name: getattr(arguments, name) for name in names}
    flags = {name: True for name in ("bisect", "saved_tensors") if getattr(arguments, name)}
    return {**{name: value for name, value in given.items() if value is not None}, **flags}


def _chosen(cards: list[Card], arguments: argparse.Namespace) -> list[Card]:
    wanted = arguments.gpus.split(",") if arguments.gpus else [str(c.index) for c in cards]
    by_index = {str(card.index): card for card in cards}
    unknown = [name for name in wanted if name not in by_index]
    if unknown:
        raise InputError(Problem("--gpus", "no such card", ",".join(unknown), ", ".join(by_index)))
    chosen = [by_index[name] for name in wanted]
    return chosen if arguments.force else [refuse_if_busy(card) for card in chosen]


def _sweep(
    arguments: argparse.Namespace, campaigns: list[Campaign], cards: list[Card] | None
) -> int:
    folder = arguments.store / device_folder(cards[0].name if cards else "cpu")
    for fault in read(folder)[1]:
        print(f"warning: {fault}", file=sys.stderr)
    also = tuple(place / folder.name for place in arguments.also)  # other cards' don't count
    ledger = Ledger(folder, also, tuple(filter(None, arguments.retry.split(","))))
    groups, done = _groups(campaigns, ledger.done(), shared=arguments.share_loads)
    left = [point.key for group in groups for point in group.points]
    settings = Settings(
        log=arguments.log or folder / "probes.log",
        timeout_s=arguments.timeout,
        load_timeout_s=arguments.load_timeout,
        budget_s=arguments.budget_seconds,
        tiny=bool(arguments.cpu),
        skip_hopeless=not arguments.no_skip,
        snapshots=arguments.snapshots,
    )
    print(f"{len(left)} probes to run, {done} recorded before; records go to {folder}")
    lanes = lanes_for([card.index for card in cards]) if cards else [cpu_lane()]
    try:
        Sweep(settings, ledger, Progress(len(left), _say)).run(groups, lanes)
    except StoreError as error:
        print(f"the record that could not be stored:\n{error.line}", file=sys.stderr)
        raise
    missing = set(left) - ledger.done()
    print(f"{len(left) - len(missing)} recorded, {len(missing)} left; the same command goes on")
    return 0


def _groups(campaigns: list[Campaign], done: set[str], *, shared: bool) -> tuple[list[Group], int]:
    """(what is left to run, in order; how many points are done). Campaigns that keep their own
    order come first and share loads as they say; of the others each point has a process of its own,
    unless loads are `shared`."""
    points = list({p.key: p for campaign in campaigns for p in campaign.points}.values())
    known = [p for p in points if p.key in done]
    ordered = {p.key for campaign in campaigns if campaign.in_order for p in campaign.points}
    left = [p for p in points if p.key not in done]
    kept = in_order([p for p in left if p.key in ordered])
    free = arrange([p for p in left if p.key not in ordered], known)
    each = _LARGEST_GROUP if shared else 1
    parts = split(kept, _LARGEST_GROUP), split(free, each, fresh_capacity=True)
    return [*parts[0], *parts[1]], len(known)


def _say(text: str) -> None:
    print(text, flush=True)


def _explain(campaigns: list[Campaign]) -> int:
    """Without a GPU: what would run, why it can't, and what can."""
    groups, _ = _groups(campaigns, set(), shared=False)
    names = ", ".join(campaign.name for campaign in campaigns)
    print(f"would measure {sum(len(g.points) for g in groups)} probes ({names}):")
    for group in groups[:5]:
        for point in group.points[:3]:
            print(f"  {describe(point)}")
    print(f"  in {len(groups)} loads")
    raise VramwiseError(
        "no NVIDIA GPU and driver were found here, so nothing real can be measured. "
        "`vramwise probe SPEC --dry` traces the same steps without a GPU; "
        "`--cpu` runs this very code on tiny models"
    )
