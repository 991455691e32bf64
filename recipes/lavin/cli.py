"""`vramwise lavin train SPEC` and `vramwise lavin demo`: LaVIN trained and judged on ScienceQA."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from planner.errors import InputError, Problem, nearest_name
from planner.flags import Parser
from recipes.console import note, out
from recipes.lavin.report import report_text
from recipes.spec_file import read_spec

CONFIGS = Path(__file__).parent / "configs"
_WHAT = ("train", "demo")


def run(argv: list[str]) -> int:
    """Entry point of the verb."""
    what, rest = (argv[0], argv[1:]) if argv else ("--help", [])
    if what in ("-h", "--help"):
        out(f"{__doc__}\n\nvramwise lavin train --help and vramwise lavin demo --help say more")
        return 0 if argv else 2
    if what == "train":
        return _train(_train_parser().parse_args(rest))
    if what == "demo":
        from recipes.lavin.demo import run as demo

        return demo(rest)
    raise InputError(Problem("lavin", "knows nothing of this", what, ", ".join(_WHAT),
                             nearest_name(what, _WHAT)))  # fmt: skip


def _train(arguments: argparse.Namespace) -> int:
    from recipes.lavin.spec import lavin_spec
    from recipes.lavin.train import LavinRun, run_lavin

    spec, settings = lavin_spec(read_spec(arguments.spec, CONFIGS))
    run = LavinRun(
        spec, settings, Path(arguments.output), device=arguments.device, say=note
    )  # fmt: skip
    report = run_lavin(run).as_dict()
    out(json.dumps(report) if arguments.json else report_text(report))
    return 0


def _train_parser() -> Parser:
    parser = Parser(prog="vramwise lavin train", description="Train and judge a LaVIN.")
    parser.add_argument("spec", help="a TOML or JSON file with a [lavin] table, -, or the name of "
                        "a shipped configuration (lavin-7b-scienceqa)")  # fmt: skip
    parser.add_argument("--output", default="runs/lavin", help="where checkpoints and results go; "
                        "a stopped run goes on from its newest checkpoint there")  # fmt: skip
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1 or cpu")
    parser.add_argument("--json", action="store_true", help="print the report as one JSON object")
    return parser
