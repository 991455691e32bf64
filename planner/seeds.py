"""Two write-ups judged: every statement of theirs with where it stands here, what is predicted,
what was measured, and whether it holds. Statements are data (data/seeds.toml); figures decide.

A judge is one of: over, within (a run's requirement against a size), fits (against its card), near
(a size, within a share), saves, saves_gb, same, faster, slower (one run against another), trains (a
count of parameters), or given, where no figure of ours can decide and `why` says what does.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, cast

from planner.answer import Estimate
from planner.estimate import estimate
from planner.measured_ladder import RESULTS, find_measured, ladder_rows
from planner.residuals import Measured, read_measured
from planner.seed_ladder import climb_seed
from planner.spec import RunSpec, plain_values, spec_from_mapping

GB = 10**9
Verdict = Literal["holds", "does not hold", "cannot be judged"]
HOLDS: Verdict = "holds"
FAILS: Verdict = "does not hold"
OPEN: Verdict = "cannot be judged"
_DATA = Path(__file__).with_name("data") / "seeds.toml"
# What a record's spec may differ in from the run's: the card, and what moves no byte of the step.
_ASIDE = frozenset({"device", "device_memory", "schedule", "versions", "data", "evaluation",
                    "vocabulary", "pruning", "liger"})  # fmt: skip


@dataclass(frozen=True, slots=True)
class Figures:
    """Figures of a run, predicted or measured; None where there is none. allocator: the smallest
    cap; required, low, high: with what the run's own card takes beside it; card_bytes: what that
    card has; card: where the figures are of."""

    allocator_bytes: int | None

    required_bytes: int | None
    low_bytes: int | None
    high_bytes: int | None
    resident_bytes: int | None
    card_bytes: int | None
    tokens_per_second: float | None
    card: str


@dataclass(frozen=True, slots=True)
class Run:
    """A named run: predicted on its own card, measured where a record has its settings."""

    name: str
    label: str
    figure: str
    spec: RunSpec
    answer: Estimate
    measured: Figures | None

    @property
    def predicted(self) -> Figures:
        a = self.answer
        low, high = a.device_required_interval_bytes
        return Figures(a.allocator_required_bytes, a.device_required_bytes, low, high,
                       a.resident_bytes, a.device_total_bytes, a.tokens_per_second,
                       a.device)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Statement:
    """One row. kind: of its judge, "" for a feature, whose verdict is None; basis: "predicted",
    "measured", or "" where no figure decided."""

    id: str
    told: str
    present: str
    where: str
    runs: tuple[Run, ...]
    kind: str
    verdict: Verdict | None
    basis: str
    why: str


def statements(records: Path | None = None, ladder: str | Path | None = None) -> list[Statement]:
    """Every row, judged. records: a folder of records (default: the checkout's, if it is there);
    ladder: rows of recipes.lavin.measure, likewise."""
    told = _read()
    folder = records if records is not None else RESULTS / "records"
    kept = list(read_measured([folder])) if any(folder.rglob("*.jsonl")) else []
    rows = ladder_rows(ladder)
    runs = {name: _run(name, run, kept, rows) for name, run in told["runs"].items()}
    return [_statement(row, runs) for row in told["rows"]]


def _statement(row: Mapping[str, Any], runs: Mapping[str, Run]) -> Statement:
    verdict, basis = _judged(row.get("judge"), runs)
    return Statement(
        row["id"], row["told"], row["present"], row["where"],
        tuple(runs[name] for name in row.get("runs", ())), row.get("judge", {}).get("kind", ""),
        verdict, basis, row["why"],
    )  # fmt: skip


def _run(
    name: str, told: Mapping[str, Any], records: Iterable[Measured],
    rows: Iterable[Mapping[str, Any]],
) -> Run:  # fmt: skip
    if "ladder" in told:
        model, key = told["ladder"]
        rung = next(rung for rung in _ladder(model) if rung.key == key)
        spec = (rung.then if told.get("published") else rung.today).spec
    else:
        spec = spec_from_mapping(told["spec"])
    answer = estimate(spec)
    # as published means an older bitsandbytes, which was not measured; in 16 bits it plays no part
    older = told.get("published") and spec.quantization != "none"
    measured = None if older else _measured(spec, answer, records, rows)
    return Run(name, told["label"], told.get("figure", "required"), spec, answer, measured)


@lru_cache(maxsize=4)
def _ladder(model: str) -> list[Any]:
    return climb_seed(model, {}, [])


def _measured(
    spec: RunSpec, answer: Estimate, records: Iterable[Measured], rows: Iterable[Mapping[str, Any]]
) -> Figures | None:
    """Of a record of the same settings on any card: the allocator's part is measured there, and
    what lies beside it is the run's own card's, predicted."""
    found = find_measured(spec, rows)
    tokens = spec.micro_batch_size * spec.sequence_length * spec.gradient_accumulation_steps
    if found is not None and found.required_bytes:
        speed = tokens / found.step_s if found.step_s else None
        return _figures(answer, found.required_bytes, None, speed, found.device)
    wanted = _settings(spec)
    alike = [record for record in records if _settings(record.spec) == wanted]
    bisected = [record for record in alike if record.passed_cap_bytes]
    if not alike:
        return None
    record = min(bisected, key=lambda r: r.passed_cap_bytes or 0) if bisected else alike[-1]
    speed = tokens / record.step_s
    return _figures(
        answer, record.passed_cap_bytes, record.resident_bytes, speed, str(record.spec.device)
    )


def _figures(
    answer: Estimate, allocator: int | None, resident: int | None, speed: float | None, card: str
) -> Figures:
    total = answer.device_total_bytes
    if allocator is None:
        return Figures(None, None, None, None, resident, total, speed, card)
    outside = (
        answer.non_torch_bytes,
        answer.device_required_interval_bytes[0] - answer.allocator_required_interval_bytes[0],
        answer.device_required_interval_bytes[1] - answer.allocator_required_interval_bytes[1],
    )
    required, low, high = (allocator + size for size in outside)
    return Figures(allocator, required, low, high, resident, total, speed, card)


def _settings(spec: RunSpec) -> dict[str, Any]:
    values = {name: value for name, value in plain_values(spec).items() if name not in _ASIDE}
    if spec.method == "full":
        del values["lora"]
    if spec.quantization not in ("nf4", "fp4"):
        del values["double_quant"]
    return values


def _judged(judge: Mapping[str, Any] | None, runs: Mapping[str, Run]) -> tuple[Verdict | None, str]:
    if judge is None:
        return None, ""
    if judge["kind"] == "given":
        return cast(Verdict, judge["verdict"]), ""
    if judge["kind"] == "trains":
        count = runs[judge["run"]].answer.parameters.trainable
        return (HOLDS if count == judge["parameters"] else FAILS), "predicted"
    names = [judge[key] for key in ("run", "from", "to") if key in judge]
    measured = [runs[name].measured for name in names]
    known = [figures for figures in measured if figures is not None]
    if len(known) == len(names):
        verdict = _compare(judge, known)
        if verdict is not None:
            return verdict, "measured"
    predicted = _compare(judge, [runs[name].predicted for name in names])
    return predicted or OPEN, "predicted"


def _compare(judge: Mapping[str, Any], figures: list[Figures]) -> Verdict | None:
    """None where these figures lack what the judge needs."""
    kind, first, last = judge["kind"], figures[0], figures[-1]
    if kind in ("faster", "slower"):
        if not first.tokens_per_second or not last.tokens_per_second:
            return None
        gain = last.tokens_per_second / first.tokens_per_second
        return _holds((gain if kind == "faster" else 1 / gain) >= judge["factor"])
    low, high, required = first.low_bytes, first.high_bytes, first.required_bytes
    if required is None or low is None or high is None or last.required_bytes is None:
        return None
    size = int(judge.get("gb", 0) * GB)
    match kind:
        case "over":
            return HOLDS if low > size else FAILS if high <= size else OPEN
        case "within":
            return HOLDS if high <= size else FAILS if low > size else OPEN
        case "fits":
            card = first.card_bytes or 0
            return HOLDS if high <= card else FAILS if low > card else OPEN
        case "near":
            return _holds(abs(required / size - 1) <= judge["share"])
        case "saves":
            return _holds(1 - last.required_bytes / required >= judge["share"])
        case "saves_gb":
            saved = (required - last.required_bytes) / GB
            return _holds(judge["low_gb"] <= saved <= judge["high_gb"])
        case "same":
            return _holds(abs(last.required_bytes / required - 1) <= judge["share"])
    raise ValueError(f"seeds.toml: no judge {kind!r}")


def _holds(is_so: bool) -> Verdict:
    return HOLDS if is_so else FAILS


@lru_cache(maxsize=1)
def _read() -> dict[str, Any]:
    import tomllib

    return tomllib.loads(_DATA.read_text(encoding="utf-8"))
