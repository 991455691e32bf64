"""How both demonstrations are called."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

from planner.flags import Parser


def demo_arguments(argv: list[str], verb: str, description: str | None) -> tuple[bool, Path]:
    """(whether JSON is asked for, the folder to work in); torch is set to one thread: operations
    this small lose more to waiting for threads than they win."""
    parser = Parser(prog=f"vramwise {verb}", description=description)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--output", type=Path, help="keep everything here (default: a new folder)")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    prefix = f"vramwise-{verb.split()[0]}-"
    return arguments.json, arguments.output or Path(tempfile.mkdtemp(prefix=prefix))
