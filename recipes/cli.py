"""`vramwise train SPEC`: what the planner expects, the run, and what came of both."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from planner.errors import VramwiseError
from planner.flags import Parser
from planner.spec import RunSpec, spec_from_mapping
from planner.units import format_gib, format_seconds
from recipes.spec_file import read_spec

CONFIGS = Path(__file__).parent / "configs"


def run(argv: list[str]) -> int:
    """Entry point of the verb. Exit code 0 when the run reached its end."""
    arguments = _parser().parse_args(argv)
    spec = spec_from_mapping(read_spec(arguments.spec, CONFIGS))
    planned = expectation(spec)
    if planned:
        _say(_planned_text(planned))
    if arguments.check:
        return _check(spec, planned)
    from recipes.report import run as train

    output = Path(arguments.output)
    report = train(
        spec, output, planned=planned, device=arguments.device, weights=arguments.weights,
        say=_say,
    )  # fmt: skip
    if arguments.json:
        print(json.dumps(report.as_dict()))
    else:
        print(report_text(report.as_dict()))
    return 0


def expectation(spec: RunSpec) -> dict[str, Any] | None:
    """The planner's answer for the spec's card or the local one; None, said why, without."""
    from planner.estimate import estimate

    try:
        answer = estimate(spec)
    except VramwiseError as error:
        _say(f"no estimate: {str(error).splitlines()[0]}")
        return None
    return {
        "device": answer.device, "verdict": str(answer.verdict),
        "peak_allocated_bytes": answer.peak_allocated_bytes,
        "device_required_bytes": answer.device_required_bytes,
        "device_total_bytes": answer.device_total_bytes,
        "step_seconds": answer.step_seconds, "tokens_per_second": answer.tokens_per_second,
    }  # fmt: skip


def report_text(report: dict[str, Any]) -> str:
    """Planned against measured, base against tuned."""
    planned = report["planned"] or {}
    lines = [f"{report['steps']} steps in {format_seconds(report['seconds'])}; {report['output']}"]
    if report["losses"]:
        lines.append(f"loss {report['losses'][0]:.4f} -> {report['losses'][-1]:.4f}")
    lines += ["", f"{'':<24}{'planned':>14}{'measured':>14}"]
    step = planned.get("step_seconds")
    peak = planned.get("peak_allocated_bytes")
    lines.append(f"{'seconds a step':<24}{format_seconds(step) if step else '-':>14}"
                 f"{format_seconds(report['step_seconds']):>14}")  # fmt: skip
    measured = report["peak_allocated_bytes"]
    lines.append(f"{'peak allocated':<24}{format_gib(peak) if peak else '-':>14}"
                 f"{format_gib(measured) if measured else 'no CUDA':>14}")  # fmt: skip
    if report["base"]:
        lines += ["", *(_summary(name, report[name]) for name in ("base", "tuned"))]
        lines.append(f"base against tuned: McNemar p = {report['p_value']:.2g}")
    return "\n".join(lines)


def _summary(name: str, values: dict[str, Any]) -> str:
    return (
        f"{name:<6} {values['right']} of {values['questions']} right ({values['accuracy']:.1%}, "
        f"95 % {values['low']:.1%} to {values['high']:.1%}), {values['invalid']} invalid, "
        f"p above chance {values['p_above_chance']:.2g}"
    )


def _check(spec: RunSpec, planned: dict[str, Any] | None) -> int:
    """The findings alone: nothing is built. 2 where one of them stops the run."""
    from recipes.models import load_config
    from recipes.preparing import check_data, check_settings, prepare, tokenizer_of

    findings = check_settings(spec, planned["step_seconds"] if planned else None)
    for finding in findings:
        print(finding)
    for finding in check_data(spec, prepare(spec, load_config(spec.model), tokenizer_of(spec))):
        print(finding)
        findings.append(finding)
    return 2 if any(finding.severity == "error" for finding in findings) else 0


def _planned_text(planned: dict[str, Any]) -> str:
    return (
        f"planned on {planned['device']}: {planned['verdict']}, "
        f"{format_gib(planned['device_required_bytes'])} of "
        f"{format_gib(planned['device_total_bytes'])}, "
        f"{format_seconds(planned['step_seconds'])} a step"
    )


def _parser() -> Parser:
    parser = Parser(prog="vramwise train", description=__doc__)
    parser.add_argument("spec", help="a TOML or JSON file, - for standard input, or the name of a "
                        "shipped configuration (chameleon-7b-spanish)")  # fmt: skip
    parser.add_argument("--output", default="runs/latest", help="where checkpoints and results go; "
                        "a stopped run goes on from its newest checkpoint there")  # fmt: skip
    parser.add_argument("--weights", default="random", help="a checkpoint's folder or Hub name, or "
                        "'random' for random weights (to time a run)")  # fmt: skip
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1 or cpu")
    parser.add_argument("--check", action="store_true", help="only check the data and settings")
    parser.add_argument("--json", action="store_true", help="print the report as one JSON object")
    return parser


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
