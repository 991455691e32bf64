"""What a 7B trace costs: at most 15 s on two cores whatever the batch, below 2 GiB of memory, twice
that where layers are compiled and the cores shared; a reused one, a fraction of a second. Each in a
process of its own, which reports."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

_TRACED = """
import json, resource, sys, time
from planner.spec import spec_from_mapping
from probes.dry.exact import answer
from probes.dry.trace import trace
spec = spec_from_mapping(json.loads(sys.argv[1]))
started = time.process_time()
told = answer(trace(spec))
print(json.dumps({
    "seconds": time.process_time() - started,
    "rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    "required_bytes": told["allocator_required_bytes"],
}))
"""


def _measured(**values: Any) -> dict[str, Any]:
    spec = json.dumps({"model": "facebook/chameleon-7b", "sequence_length": 1024, **values})
    run = subprocess.run(
        [sys.executable, "-c", _TRACED, spec], capture_output=True, text=True, check=True
    )
    return json.loads(run.stdout.splitlines()[-1])  # type: ignore[no-any-return]


@pytest.mark.slow
@pytest.mark.parametrize(("stack", "limit_s"), [("stock", 15), ("lean", 30)])
def test_a_7b_trace_takes_seconds_and_2_gib(stack: str, limit_s: float, capsys: Any) -> None:
    batch = 64  # sizes are numbers only: a batch of 1 takes as long
    told = _measured(micro_batch_size=batch, gradient_checkpointing=True, stack=stack)
    with capsys.disabled():
        gib = told["rss_bytes"] / 2**30
        sys.stdout.write(f"\n7B {stack}, batch {batch}: {told['seconds']:.1f} s, {gib:.2f} GiB\n")
    assert told["seconds"] < limit_s
    assert told["rss_bytes"] < 2 * 2**30
