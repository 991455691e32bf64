"""`vramwise probe SPEC --dry`: the exact memory of a step, without a GPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from planner.arguments import Arguments, Flag, parse_arguments
from planner.errors import InputError, Problem
from planner.spec import read_mapping
from planner.units import format_gib, format_seconds

_TOP_ROWS = 12


FLAGS = (
    Flag("timeline", "a picture of the step: .html or .png", "FILE"),
    Flag("snapshot", "a .pickle that torch's memory viewer opens", "FILE"),
    Flag("trust-code", "run the python files that a model's folder names (auto_map)"),
    Flag("model-class", "a class of your own: path/to/file.py:Class or module:Class", "CLASS"),
    Flag("dry", "trace on the meta device, no GPU"),
)


def run_dry(arguments: list[str]) -> int:
    """Trace a spec (a TOML or JSON file, -, or MODEL with flags) and print the answer."""
    given = parse_arguments("probe", _spec_first(arguments), FLAGS, description=str(__doc__))
    spec = given.run_spec()
    timeline = _output(given, "timeline", (".html", ".png"))
    snapshot = _output(given, "snapshot", (".pickle",))
    from probes.dry.exact import answer
    from probes.dry.own import OwnCode
    from probes.dry.target import target_of_spec
    from probes.dry.trace import trace

    code = OwnCode(bool(given.given.get("trust_code")), given.given.get("model_class"))
    traced = trace(spec, target=target_of_spec(spec), code=code)
    result = answer(traced)
    if timeline:
        from probes.dry.picture import save_timeline

        save_timeline(traced, timeline)
    if snapshot:
        from probes.dry.snapshot import save_snapshot

        save_snapshot(traced, snapshot)
    print(json.dumps(result) if given.json else _text(result))
    return 0


run = run_dry


def _spec_first(arguments: list[str]) -> list[str]:
    """A first argument that is a run spec, not a model, goes to --spec."""
    first = arguments[0] if arguments else ""
    if first == "-" or first.endswith(".toml") or _is_json_spec(first):
        return [f"--spec={first}", *arguments[1:]]
    return arguments


def _is_json_spec(name: str) -> bool:
    path = Path(name)
    return path.suffix == ".json" and path.is_file() and "model" in read_mapping(name)


def _output(given: Arguments, name: str, suffixes: tuple[str, ...]) -> Path | None:
    text = given.given.get(name)
    if text is None:
        return None
    path = Path(text)
    if path.suffix not in suffixes:
        raise InputError(Problem(f"--{name}", "has an unknown ending", text, ", ".join(suffixes)))
    if not path.absolute().parent.is_dir():
        raise InputError(Problem(f"--{name}", "is in no folder that exists", text))
    return path


def _text(result: dict[str, Any]) -> str:
    rows = [
        ("resident", "resident_bytes"), ("peak allocated", "peak_allocated_bytes"),
        ("peak reserved", "reserved_bytes"), ("allocator required", "allocator_required_bytes"),
        ("load peak", "load_peak_bytes"), ("evaluation peak", "eval_peak_bytes"),
    ]  # fmt: skip
    lines = [f"{label:<20}{format_gib(result[key], 3):>12}" for label, key in rows
             if result[key] is not None]  # fmt: skip
    lines += ["", f"peak at {result['peak_instant']}", ""]
    for row in _merged(result["live"])[:_TOP_ROWS]:
        lines.append(f"{format_gib(row[1], 3):>12}  {row[0]}")
    lines += [f"not known for certain: {name}" for name in result["unknown_operations"]]
    return "\n".join([*lines, "", f"traced in {format_seconds(result['seconds'])}"])


def _merged(live: list[dict[str, Any]]) -> list[tuple[str, int]]:
    """Rows of the same category and operation, whatever the layer."""
    sums: dict[str, int] = {}
    for row in live:
        label = f"{row['category']}: {row['operation']}"
        sums[label] = sums.get(label, 0) + row["bytes"]
    return sorted(sums.items(), key=lambda item: -item[1])
