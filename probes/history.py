"""`python -m probes.history RECORDS.jsonl KEY... --out FOLDER`: what the allocator was asked in one
steady step of a measured spec, in order, from torch's own memory history.

A file a record (KEY.json.gz): allocations and releases of more than 1 MiB, sizes alone, from the
third forward to the end of its step. The referee of every trace and model of a step: peaks can
agree by chance, sequences do not.
"""

from __future__ import annotations

import argparse
import gzip
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

SCHEMA = 1
LARGE_BYTES = 1 << 20  # smaller requests go to the allocator's small pool
STEPS, STEADY = 4, 3  # steps run, and the one that is kept
_ROUNDING_BYTES = 512
_MAX_ENTRIES = 3_000_000

Row = tuple[str, int, int]  # torch's action, address, size in bytes


@dataclass(frozen=True, slots=True)
class Mark:
    """A phase began: allocations made so far, and bytes allocated then."""

    phase: str
    allocations: int
    allocated_bytes: int


@dataclass(frozen=True, slots=True)
class History:
    """events: the size of each large allocation, its negative for the release. environment: words
    about the machine and its packages, as far as they are known."""

    key: str
    spec: Mapping[str, Any]
    environment: Mapping[str, Any]
    events: tuple[int, ...]
    schema: int = field(default=SCHEMA)


def read(path: Path) -> History:
    """One stored history. Raises ValueError for a schema that is not this one's."""
    values = json.loads(gzip.decompress(path.read_bytes()))
    if values.get("schema") != SCHEMA:
        raise ValueError(f"{path}: schema {values.get('schema')!r}, not {SCHEMA}")
    return History(**{**values, "events": tuple(values["events"])})


def write(folder: Path, history: History) -> Path:
    """Store it under its key; the same history gives the same bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{history.key}.json.gz"
    text = json.dumps(asdict(history), separators=(",", ":"), sort_keys=True)
    path.write_bytes(gzip.compress(text.encode(), mtime=0))
    return path


def steady_step(rows: Sequence[Row], marks: Sequence[Mark]) -> tuple[int, ...]:
    """Large requests of the kept step: from its first forward to the mark after its gradients are
    gone, so that fetching the batch is outside."""
    place = _places(rows, marks)
    start, end = _span(marks)
    begin, stop = place[start], place[end]
    sizes: dict[int, int] = {}
    events = []
    for index, (action, address, size) in enumerate(rows[: stop + 1]):
        if action == "alloc":
            sizes[address] = _rounded(size)
        if index <= begin or action not in ("alloc", "free_completed"):
            continue
        known = sizes.get(address, 0)
        if known > LARGE_BYTES:
            events.append(known if action == "alloc" else -known)
    return tuple(events)


def in_sets(events: Iterable[int]) -> list[int]:
    """Releases in a row sorted: their order is the interpreter's and frees the same bytes."""
    result: list[int] = []
    run: list[int] = []
    for event in events:
        if event < 0:
            run.append(event)
            continue
        result += [*sorted(run), event]
        run = []
    return result + sorted(run)


def _span(marks: Sequence[Mark]) -> tuple[int, int]:
    """(first forward of the kept step, last mark before the next step's)."""
    steps, first = 0, list[int]()
    for index, mark in enumerate(marks):
        if mark.phase == "forward" and len(first) == steps:
            first.append(index)
        elif mark.phase == "optimizer":
            steps += 1
    begin, following = first[STEADY - 1], first[STEADY]
    betweens = [i for i in range(begin, following) if marks[i].phase == "between"]
    return begin, betweens[-1]


def _places(rows: Sequence[Row], marks: Sequence[Mark]) -> list[int]:
    """Index of the last row before each mark. The history counts from its own beginning: the
    offsets of its counts and bytes are those under which most marks are met exactly."""
    sums, allocations, live = [], [], dict[int, int]()
    total = 0
    for index, (action, address, size) in enumerate(rows):
        if action == "alloc":
            live[address] = _rounded(size)
            total += live[address]
            allocations.append(index)
        elif action == "free_completed":
            total -= live.pop(address, 0)
        sums.append(total)

    def between(count: int) -> range:
        after = allocations[count] if count < len(allocations) else len(rows)
        return range(allocations[count - 1], after)

    best = (0, 0, 0)
    for offset in range(marks[0].allocations - 200, marks[0].allocations + 1):
        votes: Counter[int] = Counter()
        for mark in marks:
            if 0 < mark.allocations - offset <= len(allocations):
                found = {sums[i] for i in between(mark.allocations - offset)}
                votes.update(mark.allocated_bytes - value for value in found)
        if votes:
            base, met = votes.most_common(1)[0]
            best = max(best, (met, offset, base))
    _, offset, base = best
    return [
        min(
            between(max(1, mark.allocations - offset)),
            key=lambda i, mark=mark: (abs(sums[i] + base - mark.allocated_bytes), -i),  # type: ignore[misc]
        )
        for mark in marks
    ]


def _rounded(size: int) -> int:
    return -(-size // _ROUNDING_BYTES) * _ROUNDING_BYTES


def record(key: str, values: Mapping[str, Any]) -> History:
    """Run a spec's steps on this machine's card, as the probes measure them, and keep one."""
    import torch

    from planner.spec import spec_from_mapping
    from probes import loading
    from probes.configs import config_for
    from probes.environment import describe
    from probes.harness import Session
    from probes.meters import open_meter
    from probes.phases import PhaseClock
    from probes.workload import runner_for

    spec = spec_from_mapping(values)
    meter = open_meter(False)
    session = Session(spec, config_for(spec.model), meter)
    assert session.base is not None
    runner = runner_for(loading.adapt(session.base, spec, meter.device))
    marks: list[Mark] = []

    def mark(phase: str) -> None:
        stats = torch.cuda.memory_stats()
        made, live = stats["allocation.all.allocated"], stats["allocated_bytes.all.current"]
        marks.append(Mark(phase, made, live))

    class Clock(PhaseClock):
        def enter(self, phase: str | None) -> None:
            mark(phase or "")
            super().enter(phase)

    torch.cuda.memory._record_memory_history(max_entries=_MAX_ENTRIES, context=None)
    mark("")  # the history's beginning
    try:
        runner.run(Clock(meter), STEPS)
        torch.cuda.synchronize()
        entries = torch.cuda.memory._snapshot()["device_traces"][0]
    finally:
        torch.cuda.memory._record_memory_history(enabled=None)
    rows = [(e["action"], e["addr"], e["size"]) for e in entries]
    environment = describe(cpu=False).model_dump(mode="json", exclude_defaults=True)
    return History(key, values, environment, steady_step(rows, marks))


def main(arguments: Sequence[str] | None = None) -> int:
    """Record the histories of some keys; a process each, so that none sees another's memory."""
    parser = argparse.ArgumentParser("python -m probes.history", description=__doc__)
    parser.add_argument("records", type=Path)
    parser.add_argument("keys", nargs="+")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args(arguments)
    specs = specs_of([given.records])
    unknown = [key for key in given.keys if key not in specs]
    if unknown:
        parser.error(f"not in {given.records}: {', '.join(unknown)}")
    if len(given.keys) == 1:
        key = given.keys[0]
        print(write(given.out, record(key, specs[key])))  # noqa: T201
        return 0
    from subprocess import run
    from sys import executable

    results = [
        run(
            [executable, "-m", "probes.history", str(given.records), key, "--out", str(given.out)],
            check=False,
        ).returncode
        for key in given.keys
    ]  # fmt: skip
    return max(results)


def specs_of(files: Iterable[Path]) -> dict[str, dict[str, Any]]:
    """Specs of stored records by key."""
    lines = (line for file in files for line in file.read_text(encoding="utf-8").splitlines())
    return {values["key"]: values["spec"] for line in lines if (values := json.loads(line))}


if __name__ == "__main__":
    raise SystemExit(main())
