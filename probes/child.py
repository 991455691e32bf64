"""The child process of a probe: `python -m probes.child`, one load and then its shapes.

Jobs come as JSON lines on standard input, events go as JSON lines to the standard output that the
parent gave; everything that libraries print goes to standard error, the log.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import traceback
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from planner.spec import RunSpec
    from probes.harness import Session
    from probes.records import Options

_STARTED = time.monotonic()


def main() -> int:
    """Import everything slow first, without a device context, then wait for jobs."""
    _die_with_parent()
    events = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    import probes.harness  # noqa: F401

    _tell(events, event="ready", import_seconds=time.monotonic() - _STARTED)
    line = sys.stdin.readline()
    if not line:
        return 0
    job = json.loads(line)
    try:
        _run(job, events, cpu="--cpu" in sys.argv)
    except Exception as error:
        traceback.print_exc()
        _tell(events, event="crash", evidence=_last_line(error))
        return 1
    _tell(events, event="done")
    return 0


def _run(job: dict[str, Any], events: TextIO, cpu: bool) -> None:
    """job: {"gpu", "weights", "tiny", "others_used_bytes", "deadline_s", "snapshots", "probes":
    [{"key", "spec", "options"}]}; all probes share one load."""
    from planner.spec import spec_from_mapping
    from probes.records import Options

    began = time.monotonic()
    deadline = began + job["deadline_s"] if job.get("deadline_s") else None
    session = _load(job, events, cpu, deadline)
    if session is None:
        return
    build_seconds = time.monotonic() - began - session.load_seconds
    for position, probe in enumerate(job["probes"]):
        if deadline is not None and time.monotonic() > deadline:
            return
        spec, options = spec_from_mapping(probe["spec"]), Options(**probe["options"])
        _tell(events, event="begin", key=probe["key"])
        started = time.monotonic()
        folder = job.get("snapshots")
        snapshot = f"{folder}/{probe['key']}" if folder else None
        answer = _measured(session, spec, options, snapshot)
        process = {
            "position": position,
            "load_seconds": session.load_seconds,
            "build_seconds": build_seconds,
            "total_seconds": time.monotonic() - started,
        }
        _tell(events, event="result", key=probe["key"], process=process, **answer)


def _load(job: dict[str, Any], events: TextIO, cpu: bool, deadline: float | None) -> Session | None:
    """The session of the job's first spec; None (and told) where it cannot be loaded."""
    from planner.errors import VramwiseError
    from planner.spec import spec_from_mapping
    from probes.configs import config_for
    from probes.environment import describe
    from probes.harness import OutOfMemoryError, Session, Situation
    from probes.meters import open_meter
    from recipes.build import allocator_settings

    first = spec_from_mapping(job["probes"][0]["spec"])
    allocator_settings(first)
    environment = describe(cpu, job.get("gpu"), _settings(first)).model_dump(mode="json")
    situation = Situation(job.get("gpu") or 0, job["others_used_bytes"], deadline)
    meter = open_meter(cpu)
    try:
        config = config_for(first.model, tiny=job["tiny"])
        session = Session(first, config, meter, job["weights"], situation)
    except (OutOfMemoryError, VramwiseError) as error:
        outcome = "oom" if isinstance(error, OutOfMemoryError) else "skipped"
        _tell(events, event="load_failed", evidence=f"loading: {error}", outcome=outcome,
              environment=environment)  # fmt: skip
        return None
    _tell(events, event="loaded", seconds=session.load_seconds, environment=environment)
    return session


def _measured(
    session: Session, spec: RunSpec, options: Options, snapshot: str | None
) -> dict[str, Any]:
    """Outcome, evidence and meters of one probe; what is no outcome of a probe passes through."""
    from planner.errors import VramwiseError
    from probes.harness import OutOfMemoryError

    try:
        meters = session.measure(spec, options, snapshot).model_dump(mode="json")
    except OutOfMemoryError as error:
        return {"outcome": "oom", "evidence": str(error), "meters": None}
    except VramwiseError as error:
        return {"outcome": "skipped", "evidence": str(error), "meters": None}
    return {"outcome": "ok", "meters": meters}


def _die_with_parent() -> None:
    """A killed sweep leaves no child on the card (Linux: prctl(PR_SET_PDEATHSIG, SIGKILL))."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def _settings(spec: Any) -> str:
    wanted = spec.expandable_segments or spec.stack == "lean"
    return "expandable_segments:True" if wanted else ""


def _tell(events: TextIO, **event: Any) -> None:
    events.write(json.dumps(event) + "\n")
    events.flush()


def _last_line(error: Exception) -> str:
    where = traceback.extract_tb(error.__traceback__)[-1]
    text = " ".join(str(error).split())[:500]
    return f"{type(error).__name__}: {text} ({os.path.basename(where.filename)}:{where.lineno})"  # noqa: PTH119


if __name__ == "__main__":
    sys.exit(main())
