"""`vramwise models`: the catalogue, or one model with its sizes and where they were read."""

from __future__ import annotations

import json
import sys
from typing import Any

from planner.flags import Parser
from planner.models.registry import Model, aliases_of, catalogue, load_model


def run(arguments: list[str]) -> int:
    """Print the catalogue (or the model NAME) as a table, or as JSON. Exit code 0."""
    options = _parser().parse_args(arguments)
    if options.name:
        model = load_model(options.name)
        _print(describe(model), options.json, _detail)
    else:
        _print([describe(model) for model in catalogue()], options.json, _table)
    return 0


def describe(model: Model) -> dict[str, Any]:
    """What is told of a model: name, family, parameters in total and by component, source."""
    text = model.text
    return {
        "id": model.id,
        "aliases": aliases_of(model.id),
        "model_type": model.model_type,
        "parameters": {"total": model.tree.total_parameters, **model.tree.by_component()},
        "num_hidden_layers": text.num_hidden_layers,
        "hidden_size": text.hidden_size,
        "max_position_embeddings": text.max_position_embeddings,
        "source": model.source,
        "verified": model.verified,
        "note": model.note,
    }


def _parser() -> Parser:
    parser = Parser(prog="vramwise models", description=__doc__)
    parser.add_argument("name", nargs="?", help="a name, an id, a folder or a config.json")
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def _print(described: Any, as_json: bool, render: Any) -> None:
    text = json.dumps(described, indent=2) if as_json else render(described)
    sys.stdout.write(f"{text}\n")


def _table(rows: list[dict[str, Any]]) -> str:
    width = max(len(row["id"]) for row in rows)
    lines = [f"{'model':<{width}}  {'family':<12}  {'parameters':>14}"]
    for row in rows:
        mark = "" if row["verified"] else "  (unverified)"
        total = row["parameters"]["total"]
        lines.append(f"{row['id']:<{width}}  {row['model_type']:<12}  {total:>14,}{mark}")
    unverified = sum(not row["verified"] for row in rows)
    lines.append("")
    lines.append(f"{len(rows)} models, {unverified} of them with sizes that were not read from a")
    lines.append("config (`vramwise models NAME` says what they are based on). Any folder with a")
    lines.append("config.json of these families, or a model in the local Hub cache, works as well.")
    return "\n".join(lines)


def _detail(row: dict[str, Any]) -> str:
    lines = [f"{row['id']}  ({row['model_type']})"]
    for component, count in row["parameters"].items():
        lines.append(f"  {component:<16} {count:>16,}")
    lines.append(f"  layers {row['num_hidden_layers']}, width {row['hidden_size']:,}, "
                 f"positions {row['max_position_embeddings']:,}")  # fmt: skip
    if row["aliases"]:
        lines.append(f"  also: {', '.join(row['aliases'])}")
    lines.append(f"  {'read from' if row['verified'] else 'NOT verified; see'} {row['source']}")
    if row["note"]:
        lines.append(f"  {row['note']}")
    return "\n".join(lines)
