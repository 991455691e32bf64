"""`vramwise probe`: measure real steps of a spec or of a grid, on a GPU or tiny on the CPU."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from planner.errors import InputError, Problem, VramwiseError
from probes.claims import Ledger
from probes.driver import Card, find_cards, refuse_if_busy
from probes.grid import Campaign, read_campaign
from probes.order import arrange, in_order
from probes.progress import Progress, describe
from probes.store import StoreError, campaign_path, read
from probes.sweep import Settings, Sweep, cpu_lane, lanes_for

_DEFAULT_STORE = Path("results/records")


def run(argv: list[str]) -> int:
    """Entry point of `vramwise probe`. 0: every probe has an outcome; 1: none could start."""
    if "--dry" in argv:
        from probes.dry.cli import run as run_dry

        return run_dry([argument for argument in argv if argument != "--dry"])
    arguments = _parser().parse_args(argv)
    campaign = read_campaign(arguments.spec, _overrides(arguments))
    if arguments.cpu:
        return _sweep(arguments, campaign, None)
    cards = find_cards()
    if not cards:
        return _explain(campaign)
    return _sweep(arguments, campaign, _chosen(cards, arguments))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vramwise probe",
        description="Run real training steps and record their memory and speed.",
    )
    parser.add_argument("spec", help="a run spec or a grid of them (TOML or JSON), - for stdin")
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
                        help="records that count as done, too")  # fmt: skip
    parser.add_argument("--retry", default="", help="outcomes to measure again: crash,timeout")
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds a probe may take")
    parser.add_argument("--load-timeout", type=float, default=300.0, help="seconds a load may take")
    parser.add_argument("--budget-seconds", type=float, help="start no probe after this time")
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


def _sweep(arguments: argparse.Namespace, campaign: Campaign, cards: list[Card] | None) -> int:
    device = cards[0].name if cards else "cpu"
    path = campaign_path(arguments.store, device, campaign.name)
    for fault in read(path.parent)[1] if path.parent.exists() else []:
        print(f"warning: {fault}", file=sys.stderr)
    retry = tuple(name for name in arguments.retry.split(",") if name)
    ledger = Ledger(path, (path.parent, *arguments.also), retry)
    done = ledger.done()
    left = [point for point in campaign.points if point.key not in done]
    known = [point for point in campaign.points if point.key in done]
    settings = Settings(
        store=arguments.store,
        campaign=campaign.name,
        log=arguments.log or path.with_suffix(".log"),
        timeout_s=arguments.timeout,
        load_timeout_s=arguments.load_timeout,
        budget_s=arguments.budget_seconds,
        tiny=bool(arguments.cpu),
        skip_hopeless=not arguments.no_skip,
    )
    print(f"{len(left)} probes to run, {len(known)} recorded before; records go to {path}")
    sweep = Sweep(settings, ledger, Progress(len(left), _say))
    lanes = lanes_for([card.index for card in cards]) if cards else [cpu_lane()]
    try:
        sweep.run(in_order(left) if campaign.in_order else arrange(left, known), lanes)
    except StoreError as error:
        print(f"the record that could not be stored:\n{error.line}", file=sys.stderr)
        raise
    still = set(ledger.done())
    missing = [point for point in left if point.key not in still]
    print(f"{len(left) - len(missing)} recorded, {len(missing)} left; the same command goes on")
    return 0


def _say(text: str) -> None:
    print(text, flush=True)


def _explain(campaign: Campaign) -> int:
    """Without a GPU: what would run, why it can't, and what can."""
    print(f"would measure {len(campaign.points)} probes ({campaign.name}):")
    groups = arrange(campaign.points)
    for group in groups[:5]:
        for point in group.points[:3]:
            print(f"  {describe(point)}")
    print(f"  in {len(groups)} loads")
    raise VramwiseError(
        "no NVIDIA GPU and driver were found here, so nothing real can be measured. "
        "`vramwise probe SPEC --dry` traces the same steps without a GPU; "
        "`--cpu` runs this very code on tiny models"
    )
