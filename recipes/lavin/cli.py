"""`vramwise lavin train SPEC` and `vramwise lavin demo`: LaVIN trained and judged on ScienceQA."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from planner.errors import InputError, Problem, nearest_name
from planner.flags import Parser
from planner.spec import read_mapping
from planner.units import format_gib, format_seconds
from recipes.console import note, out

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

    spec, settings = lavin_spec(_mapping(arguments.spec))
    run = LavinRun(
        spec, settings, Path(arguments.output), device=arguments.device, say=note
    )  # fmt: skip
    report = run_lavin(run).as_dict()
    out(json.dumps(report) if arguments.json else report_text(report))
    return 0


def report_text(report: dict[str, Any]) -> str:
    """Losses, accuracy by the paper's columns before and after, routing by modality."""
    lines = [
        f"{report['steps']} steps in {format_seconds(report['seconds'])}, "
        f"{report['trainable_parameters']:,} parameters trained; {report['output']}",
        f"loss {report['losses'][0]:.4f} -> {report['losses'][-1]:.4f}",
    ]
    if report["peak_allocated_bytes"]:
        lines.append(f"peak allocated {format_gib(report['peak_allocated_bytes'])}")
    after, before = report["after"], report["before"]
    if after:
        lines += ["", f"{'':<8}" + "".join(f"{name:>8}" for name in after)]
        for label, scores in (("before", before), ("after", after)):
            cells = [f"{scores[n]['accuracy']:8.1%}" if n in scores else f"{'-':>8}" for n in after]
            lines.append(f"{label:<8}" + "".join(cells))
        lines.append(f"{'of':<8}" + "".join(f"{s['total']:>8}" for s in after.values()))
        chance = [f"{s['p_above_chance']:8.1g}" for s in after.values()]
        lines.append(f"{'p':<8}" + "".join(chance) + "  (after, against guessing)")
    lines += ["", f"{'router weight w0 by modality':<52}{'text':>8}{'picture':>9}"]
    for row in report["routing"]:
        cells = [f"{row[m][0]:.3f}" if row[m] else "-" for m in ("text", "picture")]
        lines.append(f"{row['adapter']:<52}{cells[0]:>8}{cells[1]:>9}")
    return "\n".join(lines)


def _mapping(source: str) -> dict[str, Any]:
    """A file, "-", or a shipped configuration's name; relative data paths start at the file."""
    shipped = Path(__file__).parent / "configs" / f"{source}.toml"
    path = shipped if shipped.is_file() and not Path(source).exists() else Path(source)
    values = read_mapping(source if source == "-" else str(path))
    for table in ("data", "evaluation"):
        if isinstance(values.get(table), dict) and isinstance(values[table].get("source"), str):
            beside = path.parent / values[table]["source"]
            if source != "-" and beside.exists():
                values[table]["source"] = str(beside)
    return values


def _train_parser() -> Parser:
    parser = Parser(prog="vramwise lavin train", description="Train and judge a LaVIN.")
    parser.add_argument("spec", help="a TOML or JSON file with a [lavin] table, -, or the name of "
                        "a shipped configuration (lavin-7b-scienceqa)")  # fmt: skip
    parser.add_argument("--output", default="runs/lavin", help="where checkpoints and results go; "
                        "a stopped run goes on from its newest checkpoint there")  # fmt: skip
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1 or cpu")
    parser.add_argument("--json", action="store_true", help="print the report as one JSON object")
    return parser
