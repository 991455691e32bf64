"""What the caching allocator must reserve: the step's own allocations, replayed.

The stream is loading, then two optimizer steps (the second meets the layout that the first left).
"""

from __future__ import annotations

from collections.abc import Iterator

from planner.memory.allocator import RESET_PEAKS, smallest_cap
from planner.memory.program import Program

Stream = list[tuple[int, int]]


def stream(program: Program, workspace_bytes: int) -> Stream:
    """(id, bytes) allocates, (id, 0) frees: loaded tensors, workspaces, a first step, optimizer
    states, a second step."""
    events: Stream = []
    count = 0
    for tensor in program.resident:
        events.append((count, tensor.nbytes))
        count += 1
    events.append(RESET_PEAKS)
    recorder = program.recorder
    sizes = [block.nbytes for block in recorder.blocks]
    for step in range(2):
        base = count
        count += len(sizes)
        for position, index in enumerate(recorder.events):
            if position == 0 and step == 0:
                events.append((-10, workspace_bytes))
                events.append((-11, workspace_bytes))
            if index >= 0:
                events.append((base + index, sizes[index]))
            else:
                events.append((base + ~index, 0))
        if step == 0:
            for size in program.states.tensors:
                events.append((count, size))
                count += 1
    return list(_positive(events))


def _positive(events: Stream) -> Iterator[tuple[int, int]]:
    """Zero-size blocks never reach the allocator."""
    empty: set[int] = set()
    for key, size in events:
        if key >= 0 and size == 0 and key in empty:
            continue
        yield key, size


def required_bytes(program: Program, workspace_bytes: int, expandable_segments: bool) -> int:
    """The smallest cap on the allocator under which the run completes."""
    return smallest_cap(
        stream(program, workspace_bytes), expandable_segments=expandable_segments
    )
