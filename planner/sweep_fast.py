"""The fast path of a sweep: a whole table of sizes from one vectorised run, held against each card.

A row far from its card's boundary needs no replay of the allocator: what the step holds live is a
lower bound of the requirement, and MOST_ABOVE_LIVE times that is an upper one. Such a row carries
the bounds and says so (basis "bounds"); its verdict is that of `fit`. A row in between is answered
by `fit` itself, while the sweep's allowance lasts; beyond it, it stays "tight" between its bounds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from planner.devices import Device
from planner.interval import requirement_interval
from planner.memory.many import Many, run_many
from planner.memory.pools import replay_parts
from planner.memory.program import load
from planner.memory.requirement import loading_parts_of
from planner.memory.workspace import HANDLES_TRAINING, cublas_workspace_bytes
from planner.models.registry import Model
from planner.non_torch import non_torch
from planner.spec import RunSpec
from planner.throughput.model import step_time

# The requirement over the live bytes: 1.17 at most on the project's records (fragmentation under a
# cap), with room.
MOST_ABOVE_LIVE = 1.3
NEAR = -1


@dataclass(frozen=True, slots=True)
class Sizes:
    """Every (micro batch, sequence) pair of a group, and its run."""

    spec: RunSpec
    model: Model
    batches: Any
    lengths: Any
    many: Many
    resident_bytes: int


def run_sizes(spec: RunSpec, model: Model, pairs: list[tuple[int, int]]) -> Sizes:
    """Run a group's pairs at once."""
    batches, lengths = (np.array(column, dtype=np.int64) for column in zip(*pairs, strict=True))
    many = run_many(spec, model, batches, lengths)
    resident = replay_parts(loading_parts_of(load(spec, model))).allocated
    return Sizes(spec, model, batches, lengths, many, resident)


@dataclass(frozen=True, slots=True)
class CardColumns:
    """A group's pairs on one card, in the order of the pairs. verdicts: index into VERDICTS, NEAR
    where the bounds leave it open."""

    verdicts: list[int]
    live_bytes: list[int]
    low_bytes: list[int]
    high_bytes: list[int]
    total_bytes: int
    step_s: list[float]
    tokens_per_s: list[float]


VERDICTS = ("fits", "does_not_fit")


def on_card(sizes: Sizes, spec: RunSpec, device: Device) -> CardColumns:
    """Hold a group against a card; `spec` gives accumulation and memory."""
    many = sizes.many
    workspace = HANDLES_TRAINING * cublas_workspace_bytes(device.compute_capability)
    static = many.static_bytes - many.resident_bytes + sizes.resident_bytes
    live = many.peak_bytes + static + workspace
    outside = non_torch(device, spec, many.paged_bytes)
    band = requirement_interval(spec, sizes.model, live)
    wide = requirement_interval(spec, sizes.model, (live * MOST_ABOVE_LIVE).astype(np.int64))
    low, high = band.low_bytes + outside.low_bytes, wide.high_bytes + outside.high_bytes
    total = spec.device_memory or device.total_bytes
    verdicts = np.where(high <= total, 0, np.where(low > total, 1, NEAR))
    time = step_time(spec, device, many.work)
    step = np.broadcast_to(time.step_s, live.shape)
    tokens = sizes.batches * sizes.lengths * spec.gradient_accumulation_steps
    return CardColumns(
        verdicts.tolist(), live.tolist(), low.tolist(), high.tolist(), total, step.tolist(),
        (tokens / step).tolist(),
    )  # fmt: skip
