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
from typing import Any, TextIO

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
    """job: {"gpu", "weights", "tiny", "others_used_bytes", "deadline_s", "probes": [{"key",
    "spec", "options"}]}; all probes share one load."""
    from planner.errors import VramwiseError
    from planner.spec import spec_from_mapping
    from probes.configs import config_for
    from probes.environment import describe
    from probes.harness import OutOfMemoryError, Session, Situation
    from probes.meters import open_meter
    from probes.records import Options
    from recipes.build import allocator_settings

    probes = [(p["key"], spec_from_mapping(p["spec"]), Options(**p["options"]))
              for p in job["probes"]]  # fmt: skip
    first = probes[0][1]
    began = time.monotonic()
    allocator_settings(first)
    environment = describe(cpu, job.get("gpu"), _settings(first))
    deadline = began + job["deadline_s"] if job.get("deadline_s") else None
    situation = Situation(
        gpu_index=job.get("gpu") or 0,
        others_used_bytes=job["others_used_bytes"],
        deadline=deadline,
    )
    meter = open_meter(cpu)
    try:
        config = config_for(first.model, tiny=job["tiny"])
        session = Session(first, config, meter, job["weights"], situation)
    except (OutOfMemoryError, VramwiseError) as error:
        _tell(events, event="load_failed", evidence=f"loading: {error}",
              outcome="oom" if isinstance(error, OutOfMemoryError) else "skipped",
              environment=environment.model_dump(mode="json"))  # fmt: skip
        return
    _tell(events, event="loaded", seconds=session.load_seconds,
          environment=environment.model_dump(mode="json"))  # fmt: skip
    build_seconds = time.monotonic() - began - session.load_seconds
    for position, (key, spec, options) in enumerate(probes):
        if deadline is not None and time.monotonic() > deadline:
            return
        _tell(events, event="begin", key=key)
        started = time.monotonic()
        snapshot = os.path.join(job["snapshots"], key) if job.get("snapshots") else None  # noqa: PTH118
        answer: dict[str, Any] = {}
        try:
            answer = {"outcome": "ok", "meters": session.measure(spec, options, snapshot)}
        except OutOfMemoryError as error:
            answer = {"outcome": "oom", "evidence": str(error)}
        except VramwiseError as error:
            answer = {"outcome": "skipped", "evidence": str(error)}
        meters = answer.pop("meters", None)
        _tell(
            events, event="result", key=key, **answer,
            meters=meters.model_dump(mode="json") if meters else None,
            process={
                "position": position,
                "load_seconds": session.load_seconds,
                "build_seconds": build_seconds,
                "total_seconds": time.monotonic() - started,
            },
        )  # fmt: skip


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
