"""A traced step as a file that torch's memory viewer (pytorch.org/memory_viz) opens: the same
structure as `torch.cuda.memory._dump_snapshot`, with addresses from the allocator's model."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

from planner.memory.allocator import CachingAllocator
from probes.dry.events import Event, Trace


def save_snapshot(traced: Trace, path: Path) -> None:
    """Write the snapshot of the whole run (loading and steps)."""
    with path.open("wb") as file:
        pickle.dump(snapshot(traced), file)


def snapshot(traced: Trace) -> dict[str, Any]:
    """{"segments", "device_traces"}: every allocation and release with its module and operation
    as the frames of its stack."""
    allocator = CachingAllocator(expandable_segments=traced.expandable)
    blocks: dict[int, Any] = {}
    entries: list[dict[str, Any]] = []
    events = [*traced.load, *traced.events]
    for index, event in enumerate(events):
        if event.kind == "empty_cache":
            allocator.empty_cache()
        elif event.kind == "alloc":
            block = blocks[event.storage_id] = allocator.malloc(event.size_bytes)
            entries.append(_entry("alloc", block.address, index, event))
        else:
            block = blocks.pop(event.storage_id)
            for action in ("free_requested", "free_completed"):
                entries.append(_entry(action, block.address, index, event))
            allocator.free(block)
    return {"segments": _segments(allocator, blocks, events), "device_traces": [entries]}


def _entry(action: str, address: int, index: int, event: Event) -> dict[str, Any]:
    return {
        "action": action, "addr": address, "size": event.size_bytes, "stream": 0,
        "time_us": index, "compile_context": "N/A", "user_metadata": event.category or "",
        "frames": _frames(event),
    }  # fmt: skip


def _frames(event: Event) -> list[dict[str, Any]]:
    names = (event.op, event.module or "(no module)", f"step {event.step} {event.phase}")
    return [{"name": name, "filename": event.category or "", "line": 0} for name in names]


def _segments(
    allocator: CachingAllocator, blocks: dict[int, Any], events: list[Event]
) -> list[dict[str, Any]]:
    made = {event.storage_id: event for event in events if event.kind == "alloc"}
    owners = {id(block): made[key] for key, block in blocks.items()}
    result = []
    for head in allocator.segments(blocks.values()):
        state = [_block(block, owners.get(id(block))) for block in head]
        held = sum(block["size"] for block in state if block["state"] == "active_allocated")
        result.append({
            "device": 0, "address": head[0].address, "stream": 0, "segment_pool_id": (0, 0),
            "total_size": sum(block["size"] for block in state), "allocated_size": held,
            "active_size": held, "requested_size": held,
            "segment_type": "large" if head[0].is_large else "small",
            "is_expandable": allocator.expandable, "frames": [], "blocks": state,
        })  # fmt: skip
    return result


def _block(block: Any, owner: Event | None) -> dict[str, Any]:
    return {
        "address": block.address, "size": block.size,
        "requested_size": owner.size_bytes if owner else 0,
        "state": "active_allocated" if block.allocated else "inactive",
        "frames": _frames(owner) if owner else [],
    }  # fmt: skip
