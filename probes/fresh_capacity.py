# ruff: noqa: T201 (a script)
"""The smallest cap of a fresh process: each try is a process of its own, capped from its start.

    python -m probes.fresh_capacity results/records --keys KEY,KEY --out FILE [--gpus 0,1]

A bisection in one process (probes.capacity) is quick, but each of its tries meets the segments that
loading and earlier tries left, and may fail at a cap that a fresh process passes. Here the search
starts at what the planner predicts. One JSON line a record, appended as it comes; keys that the
file holds are left out, so that the same command goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Queue
from typing import Any

from planner.devices import find_device
from planner.errors import InputError, Problem
from planner.estimate import estimate
from probes.capacity import around
from probes.records import Attempt, Record
from probes.store import read

_TIMEOUT_S = 240


def main(argv: Sequence[str] | None = None) -> int:
    """Search each record's smallest cap; 1 where one could not be found."""
    parser = argparse.ArgumentParser(prog="python -m probes.fresh_capacity", description=__doc__)
    parser.add_argument("records", type=Path)
    parser.add_argument("--keys", required=True, help="comma-separated")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--gpus", default="0")
    arguments = parser.parse_args(argv)
    wanted = set(arguments.keys.split(",")) - set(_known(arguments.out))
    records = [record for record in _records(arguments.records) if record.key in wanted]
    missing = wanted - {record.key for record in records}
    if missing:
        raise InputError(Problem("keys", "name no completed record", ", ".join(sorted(missing))))
    cards: Queue[str] = Queue()
    for card in arguments.gpus.split(","):
        cards.put(card)
    lock = threading.Lock()

    def search(record: Record) -> bool:
        card = cards.get()
        try:
            row = find(record, card)
        finally:
            cards.put(card)
        with lock, arguments.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
            print(json.dumps(row), flush=True)
        return row["passed_cap_bytes"] is not None

    with ThreadPoolExecutor(cards.qsize()) as pool:
        return int(not all(pool.map(search, records)))


def find(record: Record, card: str) -> dict[str, Any]:
    """One record's bracket, by processes on `card`; passed_cap_bytes None where not found."""
    assert record.meters is not None
    meters = record.meters
    spec = record.spec.model_copy(
        update={"device": record.environment and find_device(record.environment.device).id}
    )
    guess = estimate(spec).allocator_required_bytes
    fresh = record.process is not None and record.process.position == 0
    phases = meters.phases.values()
    low = max(phase.peak_allocated_bytes for phase in phases)
    high = max(phase.peak_reserved_bytes for phase in phases) if fresh else None
    found = around(lambda cap: _tried(record, card, cap), guess, low, high)
    return {
        "key": record.key, "predicted_bytes": guess,
        "peak_allocated_bytes": meters.peak_allocated_bytes,
        "failed_cap_bytes": found and found.failed_cap_bytes,
        "passed_cap_bytes": found and found.passed_cap_bytes,
        "attempts": [a.model_dump() for a in found.attempts] if found else [],
    }  # fmt: skip


def _tried(record: Record, card: str, cap_bytes: int) -> Attempt:
    values = record.model_dump(mode="json", include={"spec", "options"})
    command = [sys.executable, "-m", "probes.fresh_capacity_child", str(cap_bytes)]
    answer = subprocess.run(
        command, input=json.dumps(values), capture_output=True, text=True, check=False,
        timeout=_TIMEOUT_S, env={**os.environ, "CUDA_VISIBLE_DEVICES": card},
    )  # fmt: skip
    if answer.returncode:
        raise RuntimeError(f"{record.key} under {cap_bytes}: {answer.stderr[-600:]}")
    return Attempt(**json.loads(answer.stdout.splitlines()[-1]))


def _records(folder: Path) -> Iterable[Record]:
    for store in sorted(path for path in folder.iterdir() if path.is_dir()):
        yield from (record for record in read(store)[0] if record.outcome == "ok")


def _known(path: Path) -> list[str]:
    if not path.is_file():
        return []
    return [json.loads(line)["key"] for line in path.read_text(encoding="utf-8").splitlines()]


if __name__ == "__main__":
    sys.exit(main())
