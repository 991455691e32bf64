"""The store against torn lines, strange versions, full disks and several writers."""

from __future__ import annotations

import json
import multiprocessing
import subprocess
import sys
from pathlib import Path

import pytest

from probes.records import Options, Record, probe_key
from probes.store import append, read
from tests.probes.tiny import spec


def record(repeat: int = 0, evidence: str = "e") -> Record:
    options = Options(repeat=repeat)
    return Record(
        key=probe_key(spec(), options), campaign="c", time_utc="2026-01-01T00:00:00+00:00",
        outcome="oom", evidence=evidence, spec=spec(), options=options,
    )  # fmt: skip


def test_record_comes_back_equal(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    append(path, record(1))
    append(path, record(2))
    records, faults = read(path)
    assert records == [record(1), record(2)]
    assert not faults


def test_torn_line_is_told_and_costs_no_other_record(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    append(path, record(1))
    with path.open("ab") as handle:
        handle.write(record(2).model_dump_json().encode()[:100])
    append(path, record(3))
    records, faults = read(tmp_path)
    assert [r.options.repeat for r in records] == [1, 3]
    assert [fault.line_number for fault in faults] == [2]
    assert str(path) in str(faults[0])


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (json.dumps({**json.loads(record().model_dump_json()), "schema_version": 99}), "99"),
        ("[1, 2]", "version None"),
        (json.dumps({**json.loads(record().model_dump_json()), "outcome": "fine"}), "outcome"),
        (json.dumps({**json.loads(record().model_dump_json()), "surprise": 1}), "surprise"),
    ],
)
def test_line_that_is_no_record_is_a_fault(tmp_path: Path, line: str, reason: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(line + "\n", encoding="utf-8")
    append(path, record(1))
    records, faults = read(path)
    assert len(records) == 1
    assert reason in faults[0].reason


_FULL = """
import resource, signal, sys
from pathlib import Path
from probes.store import StoreError, append
from tests.probes.test_store import record
path = Path(sys.argv[1])
append(path, record(1))
size = path.stat().st_size
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (size + 200, size + 200))
try:
    append(path, record(2))
except StoreError as error:
    assert '"repeat":2' in error.line
    assert path.stat().st_size == size, "the torn part was not taken back"
    print("told")
"""


def test_full_disk_is_told_and_the_file_stays_whole(tmp_path: Path) -> None:
    """The kernel's own limit on the file's size cuts the write short, as a full disk does."""
    path = tmp_path / "a.jsonl"
    answer = subprocess.run(
        [sys.executable, "-c", _FULL, str(path)], capture_output=True, text=True, check=False
    )
    assert answer.stdout.strip() == "told", answer.stderr
    records, faults = read(path)
    assert [r.options.repeat for r in records] == [1]
    assert not faults


def _write_many(path: Path, start: int) -> None:
    for repeat in range(start, start + 25):
        append(path, record(repeat, evidence="x" * 20_000))


def test_several_writers_lose_and_break_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=_write_many, args=(path, 25 * i)) for i in range(3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    records, faults = read(path)
    assert not faults
    assert sorted(r.options.repeat for r in records) == list(range(75))


def test_key_ignores_the_card_and_the_length_of_the_run() -> None:
    options = Options()
    same = spec(device="rtx-3090", schedule={"epochs": 3.0})
    assert probe_key(same, options) == probe_key(spec(), options)
    assert probe_key(spec(sequence_length=33), options) != probe_key(spec(), options)
    assert probe_key(spec(), Options(bisect=True)) != probe_key(spec(), options)
