"""Who measures what now: claims beside the records of a device, so that two sweeps on one store
don't repeat a probe.

A claim names a process; one whose process is gone counts for nothing.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import psutil

from probes.capacity import is_narrow
from probes.records import Record, probe_key
from probes.store import append, lock_of, read


class Ledger:
    """The done and the claimed of one device's folder, read and written under its lock.

    also: other places whose records count; retry: outcomes that don't count.
    """

    def __init__(
        self, folder: Path, also: tuple[Path, ...] = (), retry: tuple[str, ...] = ()
    ) -> None:
        self.folder, self.retry = folder, retry
        self.lock = lock_of(folder)
        self.claims_path = folder / "claims.json"
        self._elsewhere = {key for place in also if place.exists() for key in self._done_in(place)}
        me = psutil.Process()
        self._me = {"pid": me.pid, "created": me.create_time()}

    def _done_in(self, place: Path) -> set[str]:
        """Under today's keys too: a field that the spec did not have then stands at its default."""
        counted = [r for r in read(place)[0] if r.outcome not in self.retry and is_complete(r)]
        return {key for r in counted for key in (r.key, probe_key(r.spec, r.options))}

    def done(self) -> set[str]:
        """Keys that need no measuring: recorded here, or in the other places."""
        return self._done_in(self.folder) | self._elsewhere

    def claim(self, keys: list[str]) -> list[str]:
        """Those of `keys` that nobody has done or claimed; they are ours now."""
        with self.lock:
            claims = self._claims()
            taken = self.done() | set(claims)
            mine = [key for key in keys if key not in taken]
            self._write({**claims, **dict.fromkeys(mine, self._me)})
        return mine

    def release(self, keys: list[str]) -> None:
        """Give claims back: recorded, or not measured after all."""
        with self.lock:
            claims = self._claims()
            self._write({k: v for k, v in claims.items() if k not in keys})

    def append(self, record: Record) -> None:
        """Store a record in its campaign's file. Raises StoreError."""
        append(self.folder / f"{record.campaign}.jsonl", record, self.lock)

    def _claims(self) -> dict[str, dict[str, float]]:
        try:
            claims = json.loads(self.claims_path.read_text(encoding="utf-8"))
        except (FileNotFoundError, json.JSONDecodeError):
            return {}
        return {key: who for key, who in claims.items() if _alive(who)}

    def _write(self, claims: dict[str, dict[str, float]]) -> None:
        if not claims:
            self.claims_path.unlink(missing_ok=True)
            return
        draft = self.claims_path.with_suffix(f".{os.getpid()}")
        draft.write_text(json.dumps(claims), encoding="utf-8")
        draft.replace(self.claims_path)


def is_complete(record: Record) -> bool:
    """Everything that was asked for was reached: a bisection may have met the budget's end."""
    if record.outcome != "ok" or not record.options.bisect:
        return True
    capacity = record.meters.capacity if record.meters is not None else None
    if capacity is None:
        return False
    low = capacity.failed_cap_bytes or record.meters.peak_allocated_bytes  # type: ignore[union-attr]
    evaluation = record.meters.phases.get("evaluation")  # type: ignore[union-attr]
    if evaluation is not None:
        low = max(low, evaluation.peak_allocated_bytes)
    return is_narrow(low, capacity.passed_cap_bytes, slack=1.1)


def _alive(who: dict[str, float]) -> bool:
    try:
        return abs(psutil.Process(int(who["pid"])).create_time() - who["created"]) < 1.0
    except (psutil.NoSuchProcess, KeyError, ValueError):
        return False
