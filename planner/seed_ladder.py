"""A published ladder, rung by rung: predicted for today's stack and for the published one, measured
where a row exists, beside the figure that was published. The rungs are data (data/ladders.json)."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from planner.ladder import Rung, climb
from planner.levers import Change
from planner.measured_ladder import Measured, find_measured
from planner.models.registry import load_model
from planner.spec import RunSpec, spec_from_mapping
from planner.sweep import IMPOSSIBLE

GB = 10**9  # the write-ups' unit
_DATA = Path(__file__).with_name("data") / "ladders.json"


@dataclass(frozen=True, slots=True)
class Published:
    """What was written: the words, and the bounds that they state, in bytes."""

    quoted: str = ""
    low_bytes: int | None = None
    high_bytes: int | None = None

    def off(self, required_bytes: int) -> float | None:
        """By how much a requirement misses the bounds, relative to the nearest: 0 inside them,
        negative below, None where there is none."""
        low, high = self.low_bytes, self.high_bytes
        if low is not None and required_bytes < low:
            return required_bytes / low - 1
        if high is not None and required_bytes > high:
            return required_bytes / high - 1
        return 0.0 if low is not None or high is not None else None


@dataclass(frozen=True, slots=True)
class SeedRung:
    """today: this project's stack; then: attention, precision and library versions as published,
    where no switch of this project stands in the way; measured: a run of today's spec."""

    key: str
    name: str
    today: Rung
    then: Rung
    published: Published
    measured: Measured | None
    why: str

    @property
    def off(self) -> float | None:
        """The published figure, missed by so much, by the prediction for the published stack."""
        size = self.then.row.device_required_bytes
        return None if size is None else self.published.off(size)

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready: the rung of today with what stands beside it."""
        published = {name: getattr(self.published, name) for name in self.published.__slots__}
        return {
            **self.today.as_dict(), "key": self.key, "rung": self.name,
            "as_published": self.then.as_dict(), "published": published, "off": self.off,
            "measured": self.measured._asdict() if self.measured else None, "why": self.why,
        }  # fmt: skip


def seed_of(model: str) -> str | None:
    """The published ladder that a model belongs to."""
    identity = load_model(model).id
    return next((seed for seed, told in _read().items() if identity in told["models"]), None)


def seed_base(model: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """A spec's mapping with what the ladder sets where nothing was given."""
    seed = seed_of(model)
    told = _read()[str(seed)]
    base = {"device": told["device"]} if not {"device", "device_memory"} & values.keys() else {}
    return {**told["shared"], **base, **values}


def climb_seed(
    model: str, values: Mapping[str, Any], rows: Iterable[Mapping[str, Any]]
) -> list[SeedRung]:
    """Every rung of the ladder of `model`. values: the spec's mapping, which holds on all rungs but
    where a rung changes it; rows: measured ones."""
    told, measured = _read()[str(seed_of(model))], list(rows)
    identity = load_model(model).id
    own = told["models"][identity]
    base = seed_base(model, {**values, "model": identity})
    today = spec_from_mapping(base)
    then = spec_from_mapping({**base, **told["as_published"]})
    rungs = _rungs(told["rungs"], identity, own["full_model"])
    changes = [(str(key), change) for key, change in rungs]
    found = []
    for new, old in zip(climb(today, changes), climb(then, changes), strict=True):
        published = _published(own["published"].get(new.name, {}))
        name = next(rung["name"] for rung in told["rungs"] if rung["key"] == new.name)
        row = find_measured(new.spec, measured) if new.row.verdict != IMPOSSIBLE else None
        found.append(SeedRung(new.name, name, new, old, published, row, told["why"][new.name]))
    return found


def _rungs(
    listed: Iterable[Mapping[str, Any]], identity: str, full_model: str | None
) -> Iterable[tuple[str, Change]]:
    """(key, change): the first is of another model, left out where there is none of that size."""
    skipped: dict[str, Any] = {}
    for rung in listed:
        fields = dict(rung["fields"])
        if rung["key"] == "full":
            if full_model is None:
                skipped = {k: v for k, v in fields.items() if k != "method"}
                continue
            fields["model"] = full_model
        else:
            fields = {**skipped, "model": identity, **fields}
            skipped = {}
        yield rung["key"], Change(fields)


def _published(told: Mapping[str, Any]) -> Published:
    low, high = (told.get(name) for name in ("low_gb", "high_gb"))
    return Published(
        told.get("quoted", ""), None if low is None else int(low * GB),
        None if high is None else int(high * GB),
    )  # fmt: skip


@lru_cache(maxsize=1)
def _read() -> dict[str, Any]:
    told: dict[str, Any] = json.loads(_DATA.read_text(encoding="utf-8"))
    return told


def source_of(model: str) -> str:
    """Where the ladder was published."""
    return str(_read()[str(seed_of(model))]["source"])


def spec_of_rung(model: str, key: str, values: Mapping[str, Any] | None = None) -> RunSpec:
    """Today's spec of one rung."""
    return next(rung.today.spec for rung in climb_seed(model, values or {}, []) if rung.key == key)
