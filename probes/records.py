"""The record of one probe: what was run, where, how it ended, and every meter that was read.

A record is one JSON line. `SCHEMA_VERSION` changes when a field changes its meaning; a reader meets
an unknown version with an error, never with a guess. Units are in the names, words are torch's.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from planner.spec import RunSpec

SCHEMA_VERSION = 1
# Evaluation batches that a probe runs: one that warms up, two that are timed.
EVALUATIONS = 3
Outcome = Literal["ok", "oom", "crash", "timeout", "skipped"]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class Environment(_Frozen):
    """Everything around the process that moves memory or time."""

    device: str
    device_total_bytes: int
    driver: str | None = None
    cuda: str | None = None
    compute_capability: str | None = None
    torch: str
    transformers: str
    peft: str
    accelerate: str
    bitsandbytes: str | None = None
    python: str
    allocator_settings: str = ""
    gpu_index: int | None = None
    runtime: str = ""


class Spread(_Frozen):
    """Timed repeats, seconds: median, extremes, and how many there were."""

    median_s: float
    min_s: float
    max_s: float
    count: int


class PhaseMeters(_Frozen):
    """One phase of a step (or of loading), the largest over the repeats.

    Peaks are those reached within the phase; `end_*` are the levels at its end. `seconds` is the
    phase's part of one optimizer step (all its micro batches), from device events.
    """

    peak_allocated_bytes: int
    peak_active_bytes: int
    peak_reserved_bytes: int
    end_allocated_bytes: int
    end_reserved_bytes: int
    peak_inactive_split_bytes: int = 0
    seconds: Spread | None = None


class Driver(_Frozen):
    """What NVML says of the card. `others_*`: before this process made its context."""

    used_bytes: int
    others_used_bytes: int
    process_used_bytes: int | None = None
    non_torch_bytes: int


class Attempt(_Frozen):
    """One run under a cap: its size, whether the steps completed, the allocator's retries."""

    cap_bytes: int
    passed: bool
    retries: int = 0


class Capacity(_Frozen):
    """The smallest cap on the allocator under which the steps complete, bracketed.

    `passed_cap_bytes` completed all the record's steps; `failed_cap_bytes` (None when nothing
    smaller was tried) ran out of memory. The required capacity lies in (failed, passed].
    """

    failed_cap_bytes: int | None = None
    passed_cap_bytes: int
    attempts: tuple[Attempt, ...]
    seconds: float


class Options(_Frozen):
    """How a probe is run, apart from the spec. Part of a probe's identity."""

    steps: int = 4
    warmup_steps: int = 2
    bisect: bool = False
    evaluate: bool = False
    saved_tensors: bool = False
    weights: str = "random"
    repeat: int = 0


class Meters(_Frozen):
    """What was measured. Absent parts were not asked for, or not reached."""

    parameters_total: int
    parameters_trainable: int
    parameters_bytes: int
    resident_bytes: int
    resident_reserved_bytes: int
    phases: dict[str, PhaseMeters]
    peak_allocated_bytes: int
    peak_reserved_bytes: int
    peak_phase: str
    step_seconds: Spread | None = None
    optimizer_steps: int = 0
    optimizer_steps_skipped: int = 0
    retries: int = 0
    ooms: int = 0
    driver: Driver | None = None
    host_rss_bytes: int = 0
    host_peak_rss_bytes: int = 0
    saved_tensors_bytes: dict[str, int] | None = None
    capacity: Capacity | None = None
    losses: tuple[float, ...] = ()


class Process(_Frozen):
    """Where in its child process a probe stood, and what it cost beyond its steps."""

    position: int
    load_seconds: float
    build_seconds: float
    total_seconds: float
    import_seconds: float = 0.0


class Record(_Frozen):
    """One line of a store."""

    schema_version: Literal[1] = 1
    key: str
    campaign: str
    time_utc: str
    outcome: Outcome
    evidence: str | None = None
    spec: RunSpec
    options: Options
    environment: Environment | None = None
    meters: Meters | None = None
    process: Process | None = None
    predicted: dict[str, Any] | None = None


def probe_key(spec: RunSpec, options: Options) -> str:
    """16 hex digits that name a probe: the spec (its device and schedule length apart, which move
    neither bytes nor seconds of a step) and how it is run."""
    apart = {"device", "device_memory", "host_memory", "schedule"}
    values = spec.model_dump(mode="json", exclude=apart)
    values["options"] = options.model_dump(mode="json")
    text = json.dumps(values, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]
