"""Who measures what now: claims beside a store, so that two sweeps on it don't repeat a probe.

A claim names a process; one whose process is gone counts for nothing.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import psutil

from probes.store import lock_of, read


class Ledger:
    """The done and the claimed of one store file, read and written under its lock."""

    def __init__(
        self, path: Path, also: tuple[Path, ...] = (), retry: tuple[str, ...] = ()
    ) -> None:
        self.path, self.retry = path, retry
        self.claims_path = path.with_suffix(".claims")
        self._elsewhere = {key for place in also if place.exists() for key in self._done_in(place)}
        me = psutil.Process()
        self._me = {"pid": me.pid, "created": me.create_time()}

    def _done_in(self, place: Path) -> set[str]:
        return {r.key for r in read(place)[0] if r.outcome not in self.retry}

    def done(self) -> set[str]:
        """Keys that need no measuring: recorded here, or in the other places."""
        here = self._done_in(self.path) if self.path.exists() else set()
        return here | self._elsewhere

    def claim(self, keys: list[str]) -> list[str]:
        """Those of `keys` that nobody has done or claimed; they are ours now."""
        with lock_of(self.path):
            claims = self._claims()
            taken = self.done() | set(claims)
            mine = [key for key in keys if key not in taken]
            self._write({**claims, **dict.fromkeys(mine, self._me)})
        return mine

    def release(self, keys: list[str]) -> None:
        """Give claims back: recorded, or not measured after all."""
        with lock_of(self.path):
            claims = self._claims()
            self._write({k: v for k, v in claims.items() if k not in keys})

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
        draft = self.claims_path.with_suffix(f".claims.{os.getpid()}")
        draft.write_text(json.dumps(claims), encoding="utf-8")
        draft.replace(self.claims_path)


def _alive(who: dict[str, float]) -> bool:
    try:
        return abs(psutil.Process(int(who["pid"])).create_time() - who["created"]) < 1.0
    except (psutil.NoSuchProcess, KeyError, ValueError):
        return False
