# ruff: noqa: T201 (a script)
"""One try of probes.fresh_capacity: {"spec", "options"} on standard input, the cap in bytes as the
argument; prints an `Attempt`."""

from __future__ import annotations

import json
import sys

from planner.spec import spec_from_mapping
from probes.configs import config_for
from probes.harness import OutOfMemoryError, Session
from probes.meters import open_meter
from probes.records import Attempt, Options
from recipes.build import allocator_settings


def main() -> int:
    """Load and train under the cap."""
    cap_bytes = int(sys.argv[1])
    given = json.load(sys.stdin)
    spec = spec_from_mapping(given["spec"])
    options = Options(**{**given["options"], "bisect": False, "steps": 3, "warmup_steps": 1})
    allocator_settings(spec)
    meter = open_meter(False)
    before = meter.levels().retries
    meter.cap(cap_bytes)
    try:
        session = Session(spec, config_for(spec.model, tiny=False), meter, options.weights)
        session.measure(spec, options)
        passed = True
    except OutOfMemoryError:
        passed = False
    retries = meter.levels().retries - before
    print(Attempt(cap_bytes=cap_bytes, passed=passed, retries=retries).model_dump_json())
    return 0


if __name__ == "__main__":
    sys.exit(main())
