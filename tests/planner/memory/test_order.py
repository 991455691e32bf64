"""The shadow program against the real modelling code, one large allocation after another: what the
caching allocator makes of a step depends on the order as much as on the sizes."""

from __future__ import annotations

from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

import pytest

from planner.memory.allocator import SMALL_BYTES
from planner.memory.program import Program
from probes.dry.events import Trace
from tests.planner.memory.referee import both
from tests.planner.memory.test_referee import CASES, _name

Steps = list[tuple[str, int]]

# Differing stretches that are known, by a part of the case's name, and why.
KNOWN = {
    # under a dispatch mode torch puts indexed rows into a copy (areAnyTensorSubclassLike)
    "Qwen2.5-VL": 5,
    "Qwen2-VL": 2,  # the merger's norm is released one statement late
    "gemma-3-4b": 5,  # the projector's pooled features, likewise
    "method=full-sequence_length=1536": 5,  # the image quantizer's distances, likewise
    "llava-1.5-7b-hf-micro_batch_size=2-images_per_sample=1-quantization=none-gradient": 2,
    # the projector's output is let go one statement late
    "llava-1.5-7b-hf-micro_batch_size=2-images_per_sample=1-quantization=none-method=full": 2,
}


def traced_steps(traced: Trace) -> Steps:
    """Large allocations and releases of the last step, inputs and workspaces apart."""
    last = traced.events[-1].step
    return _sorted_releases([
        ("alloc" if event.kind == "alloc" else "free", event.size_bytes)
        for event in traced.events
        if event.step == last and event.kind != "empty_cache" and event.size_bytes > SMALL_BYTES
        and event.category not in ("workspace", "inputs")
    ])  # fmt: skip


def planned_steps(program: Program) -> Steps:
    recorder = program.recorder
    steps = []
    for index in recorder.events:
        place = index if index >= 0 else ~index
        size = recorder.sizes[place]
        if size > SMALL_BYTES and recorder.blocks[place].category != "inputs":
            steps.append(("alloc" if index >= 0 else "free", size))
    return _sorted_releases(steps)


def _sorted_releases(steps: Steps) -> Steps:
    """Releases in a row leave the same free blocks in any order."""
    found: Steps = []
    row: Steps = []
    for step in steps:
        if step[0] == "free":
            row.append(step)
            continue
        found += [*sorted(row), step]
        row = []
    return found + sorted(row)


@pytest.mark.parametrize("case", CASES, ids=_name)
def test_large_allocations_come_in_the_order_of_the_real_code(
    case: tuple[str, dict[str, Any], dict[str, Any]], tmp_path: Path
) -> None:
    traced, planned = both(tmp_path, *case)
    expected, found = traced_steps(traced), planned_steps(planned)
    assert len(expected) > 100
    matcher = SequenceMatcher(None, expected, found, autojunk=False)
    differing = [code for code in matcher.get_opcodes() if code[0] != "equal"]
    allowed = max((n for part, n in KNOWN.items() if part in _name(case)), default=0)
    assert len(differing) <= allowed, differing[:5]
