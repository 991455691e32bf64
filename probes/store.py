"""The store: append-only JSON lines, one file a campaign, one folder a device.

Appends are one `write` of one line under a lock, flushed to the disk before they return, so that a
kill at any moment loses nothing that was reported as stored. Reading never guesses: a broken line
or an unknown version is returned as a fault, with its file and number, beside the good records.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock
from pydantic import ValidationError

from planner.errors import VramwiseError
from probes.records import SCHEMA_VERSION, Record


class StoreError(VramwiseError):
    """The store cannot be written. Carries the line that was not stored, so nothing is lost."""

    def __init__(self, message: str, line: str) -> None:
        self.line = line
        super().__init__(message)


@dataclass(frozen=True, slots=True)
class Fault:
    """A line that could not be read as a record."""

    path: Path
    line_number: int
    reason: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line_number}: {self.reason}"


def device_folder(device: str) -> str:
    """'NVIDIA H200' -> 'nvidia-h200'."""
    return re.sub(r"[^a-z0-9.]+", "-", device.lower()).strip("-") or "unknown"


def lock_of(folder: Path) -> FileLock:
    """The lock that guards a device's folder. Re-entrant for the same object and thread."""
    folder.mkdir(parents=True, exist_ok=True)
    return FileLock(str(folder / "store.lock"), timeout=60)


def latest(records: Iterable[Record]) -> list[Record]:
    """One record a probe, the last: a probe measured again replaces what it said before."""
    return list({record.key: record for record in records}.values())


def append(path: Path, record: Record, lock: FileLock | None = None) -> None:
    """Store one record durably. Raises StoreError, the file as it was, when the disk refuses."""
    line = record.model_dump_json(exclude_defaults=False, exclude_none=True)
    with lock or lock_of(path.parent):
        _append_line(path, line)


def _append_line(path: Path, line: str) -> None:
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    except OSError as error:
        raise StoreError(f"cannot open {path}: {error.strerror}", line) from None
    try:
        before = os.fstat(handle).st_size
        torn = before > 0 and os.pread(handle, 1, before - 1) != b"\n"
        data = (b"\n" if torn else b"") + line.encode() + b"\n"
        try:
            written = os.write(handle, data)
            if written != len(data):
                raise OSError(28, "no space left on the device")
            os.fsync(handle)
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(handle, before)
            message = f"a record could not be stored in {path}: {error.strerror or error}"
            raise StoreError(message, line) from None
    finally:
        os.close(handle)


def read(path: Path) -> tuple[list[Record], list[Fault]]:
    """Records of a file, or of all .jsonl files below a folder, and the lines that are none."""
    records: list[Record] = []
    faults: list[Fault] = []
    for file in [path] if path.is_file() else sorted(path.rglob("*.jsonl")):
        for number, line in _lines(file):
            parsed = parse(line)
            if isinstance(parsed, Record):
                records.append(parsed)
            else:
                faults.append(Fault(file, number, parsed))
    return records, faults


def parse(line: str) -> Record | str:
    """One line -> a record, or the reason why it is none."""
    try:
        values = json.loads(line)
    except json.JSONDecodeError as error:
        return f"not a JSON object ({error.msg} at column {error.colno})"
    version = values.get("schema_version") if isinstance(values, dict) else None
    if version != SCHEMA_VERSION:
        return f"schema version {version!r}; this vramwise reads {SCHEMA_VERSION}"
    try:
        return Record.model_validate_json(line)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        return f"not a record: {'.'.join(map(str, first['loc']))}: {first['msg']}"


def _lines(file: Path) -> Iterator[tuple[int, str]]:
    with file.open("rb") as handle:
        for number, raw in enumerate(handle, start=1):
            text = raw.decode("utf-8", errors="replace").strip()
            if text:
                yield number, text
