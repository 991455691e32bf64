"""`vramwise calibrate`: learn this card from records, and show the errors on those held out."""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from pathlib import Path

from planner.accuracy import error_lines, report_markdown, with_accuracy
from planner.calibration import SHIPPED, read, user_file
from planner.devices import find_device
from planner.flags import Parser
from planner.learn import learn
from planner.meters import Meters, read_meters
from planner.other_tools import read_tools
from planner.published import published_markdown, read_published
from planner.residuals import Measured, Residual, read_measured, residuals


def run(arguments: list[str]) -> int:
    """Learn from the records given, print errors before and after. Exit code 0."""
    options = _parser().parse_args(arguments)
    paths = [Path(path) for path in options.records]
    measured = list(read_measured(paths))
    rows, refused = residuals(measured)
    if options.report:
        _report(options, rows, refused, read_meters(paths))
        return 0
    target = SHIPPED if options.shipped else Path(options.out or user_file())
    kept = read(target) if target.is_file() else {}
    for name, of_device in _by_device(rows).items():
        before = [row for row in of_device if row.measured.held_out]
        sys.stdout.write(f"{name}: {len(of_device)} records\nbefore, on the held-out third:\n")
        sys.stdout.write("".join(f"  {line}\n" for line in error_lines(before)))
        kept[name] = learn(name, of_device)
        _write(target, [calibration.as_dict() for calibration in kept.values()])
        after, _ = residuals(row.measured for row in before)
        sys.stdout.write("after:\n" + "".join(f"  {line}\n" for line in error_lines(after)))
    for row, reason in refused:
        sys.stdout.write(f"not predicted: {row.spec.model}: {reason}\n")
    sys.stdout.write(f"wrote {target}\n")
    return 0


def _report(
    options: Namespace,
    rows: list[Residual],
    refused: list[tuple[Measured, str]],
    meters: dict[str, Meters],
) -> None:
    """The report, the figures of others beside it, and the README's short form."""
    report = Path(options.report)
    others = Path(options.others or report.with_name("other-tools.csv"))
    tools = read_tools(others) if options.others or others.is_file() else []
    _text(report, report_markdown(rows, refused, meters, tools))
    figures = Path(options.published)
    if figures.is_file():
        _text(report.with_name("published.md"), published_markdown(read_published(figures)))
    if options.readme:
        readme = Path(options.readme)
        _text(readme, with_accuracy(readme.read_text(encoding="utf-8"), rows, tools))


def _text(target: Path, text: str) -> None:
    target.write_text(text, encoding="utf-8")
    sys.stdout.write(f"wrote {target}\n")


def _by_device(rows: list[Residual]) -> dict[str, list[Residual]]:
    groups: dict[str, list[Residual]] = {}
    for row in rows:
        groups.setdefault(find_device(row.measured.spec.device or "").id, []).append(row)
    return groups


def _write(target: Path, entries: list[dict[str, object]]) -> None:
    from planner.calibration import forget

    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_suffix(".partial")
    partial.write_text(json.dumps(entries, indent=1) + "\n", encoding="utf-8")
    partial.replace(target)
    forget()


def _parser() -> Parser:
    parser = Parser(prog="vramwise calibrate", description=__doc__)
    parser.add_argument("records", nargs="+", help=".jsonl files of `vramwise probe`, or folders")
    parser.add_argument("--out", help="where to keep it (default: the user's configuration)")
    parser.add_argument("--shipped", action="store_true", help="write the project's own data")
    parser.add_argument("--report", metavar="FILE", help="write the accuracy report instead")
    parser.add_argument("--readme", metavar="FILE", help="with --report: its short form, here too")
    parser.add_argument(
        "--others",
        metavar="CSV",
        help="with --report: other tools' answers (default: other-tools.csv there)",
    )
    parser.add_argument(
        "--published",
        metavar="CSV",
        default="results/published.csv",
        help="with --report: figures of others; writes published.md beside it",
    )
    return parser
