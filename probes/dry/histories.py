"""`python -m probes.dry.histories`: traces held against stored allocator histories, request by
request (probes/history.py)."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from difflib import SequenceMatcher
from pathlib import Path

from planner.devices import find_device
from planner.spec import spec_from_mapping
from probes.dry.events import Event, Trace
from probes.dry.target import target_of
from probes.dry.trace import trace
from probes.history import LARGE_BYTES, History, in_sets, read

STORED = Path("results/histories")


def large_events(traced: Trace) -> list[Event]:
    """The last step's large requests. The batch comes and goes at the step's boundary: left out."""
    last = traced.events[-1].step
    return [
        e for e in traced.events
        if e.step == last and e.size_bytes > LARGE_BYTES and e.category != "inputs"
        and e.kind in ("alloc", "free")
    ]  # fmt: skip


def sizes(events: Sequence[Event]) -> list[int]:
    """As a history has them."""
    return [e.size_bytes if e.kind == "alloc" else -e.size_bytes for e in events]


def trace_of(history: History) -> Trace:
    """The history's spec traced for its card."""
    spec = spec_from_mapping(history.spec)
    return trace(spec, target=target_of(find_device(history.environment["device"])))


def differences(measured: Sequence[int], traced: Sequence[int]) -> list[tuple[list[int], ...]]:
    """(measured, traced) where the two sequences differ, releases in a row as sets."""
    a, b = in_sets(measured), in_sets(traced)
    if a == b:
        return []
    matcher = SequenceMatcher(None, a, b, autojunk=False)
    return [(a[i1:i2], b[j1:j2]) for tag, i1, i2, j1, j2 in matcher.get_opcodes() if tag != "equal"]


def main(arguments: Sequence[str] | None = None) -> int:
    """A line a history; with -v what differs."""
    parser = argparse.ArgumentParser("python -m probes.dry.histories", description=__doc__)
    parser.add_argument("--histories", type=Path, default=STORED)
    parser.add_argument("--only", default="", help="keys that begin so")
    parser.add_argument("-v", "--verbose", action="store_true")
    given = parser.parse_args(arguments)
    failed = 0
    for path in sorted(given.histories.rglob(f"{given.only}*.json.gz")):
        history = read(path)
        found = differences(history.events, sizes(large_events(trace_of(history))))
        failed += bool(found)
        words = f"{len(found)} differences" if found else "the same"
        print(f"{history.key} {len(history.events)} events: {words}", flush=True)  # noqa: T201
        for measured, traced in found if given.verbose else ():
            print(f"  measured {measured}\n  traced   {traced}")  # noqa: T201
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
