"""The largest micro batch, sequence, rank or number of images that fits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from planner.answer import Estimate
from planner.errors import InputError, Problem, nearest_name
from planner.estimate import device_of, estimate
from planner.levers import apply
from planner.memory.program import run
from planner.memory.workspace import HANDLES_TRAINING, cublas_workspace_bytes
from planner.models.registry import load_model
from planner.non_torch import non_torch
from planner.spec import RunSpec

FIELDS = ("micro_batch_size", "sequence_length", "lora.rank", "images_per_sample")
_ALIASES = {"rank": "lora.rank", "images": "images_per_sample", "batch": "micro_batch_size",
            "sequence": "sequence_length"}  # fmt: skip
_MOST = {"micro_batch_size": 2**20, "sequence_length": 2**24, "lora.rank": 65536}


@dataclass(frozen=True, slots=True)
class Largest:
    """The largest value whose verdict is "fits", with its answer and that of the next value.

    value None: not even `smallest` fits. limit: why no larger value was asked, where the memory
    is not the reason; `beyond` is then None.
    """

    field: str
    value: int | None
    smallest: int
    answer: Estimate | None
    next_value: int | None
    beyond: Estimate | None
    limit: str = ""

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "field": self.field,
            "value": self.value,
            "limit": self.limit,
            "answer": self.answer.as_dict() if self.answer else None,
            "next_value": self.next_value,
            "next_answer": self.beyond.as_dict() if self.beyond else None,
        }


def largest(spec: RunSpec, field: str) -> Largest:
    """Solve for `field`; verified at the value and at the one after it.

    First the peak alone is bisected, which the requirement never undercuts: an upper bound found
    without replaying the allocator. Then whole answers, from that bound down.
    """
    name = _known(field)
    smallest = _smallest(spec, name)
    most, limit = _most(spec, name)
    if most < smallest:
        raise InputError(Problem(name, f"no value is possible: {limit}"))
    answers: dict[int, Estimate] = {}

    def answer(value: int) -> Estimate:
        if value not in answers:
            answers[value] = estimate(apply(spec, {name: value}))
        return answers[value]

    def fits(value: int) -> bool:
        return answer(value).verdict == "fits"

    if not fits(smallest):
        return Largest(name, None, smallest, None, smallest, answer(smallest))
    bound = _last(smallest, most, lambda value: _peak_fits(apply(spec, {name: value})))
    value = _last_downwards(smallest, bound, fits)
    if value == most:
        return Largest(name, value, smallest, answer(value), None, None, limit)
    return Largest(name, value, smallest, answer(value), value + 1, answer(value + 1))


def _peak_fits(spec: RunSpec) -> bool:
    """Whether the peak of live bytes passes, a necessary condition of "fits"."""
    model, device = load_model(spec.model), device_of(spec)
    program = run(spec, model)
    workspace = HANDLES_TRAINING * cublas_workspace_bytes(device.compute_capability)
    outside = non_torch(device, spec, program.states.paged_bytes)
    needed = program.static_bytes + program.peak.peak_bytes + workspace + outside.high_bytes
    return bool(needed <= (spec.device_memory or device.total_bytes))


def _last(low: int, most: int, holds: Callable[[int], bool]) -> int:
    """The last value in [low, most] that holds: steps that double, then bisection."""
    step, high = 1, most + 1
    while low + step < high:
        if holds(low + step):
            low += step
            step *= 2
        else:
            high = low + step
    if low + 1 < high and low < most and high == most + 1 and holds(most):
        return most
    return _bisect(low, min(high, most + 1), holds)


def _last_downwards(smallest: int, bound: int, holds: Callable[[int], bool]) -> int:
    """The last value in [smallest, bound] that holds, looking near `bound` first."""
    if holds(bound):
        return bound
    step, low, high = max(1, bound // 32), bound, bound
    while low > smallest:
        low = max(smallest, high - step)
        if holds(low):
            break
        high, step = low, step * 2
    return _bisect(low, high, holds)


def _bisect(low: int, high: int, holds: Callable[[int], bool]) -> int:
    """`low` holds, `high` does not (or is out of range): the last value that holds."""
    while high - low > 1:
        middle = (low + high) // 2
        if holds(middle):
            low = middle
        else:
            high = middle
    return low


def _known(field: str) -> str:
    name = field.replace("-", "_")
    name = _ALIASES.get(name, "lora.rank" if name == "lora_rank" else name)
    if name not in FIELDS:
        near = nearest_name(field, FIELDS)
        raise InputError(Problem("--max", "is not a field to solve for", field, ", ".join(FIELDS),
                                 near))  # fmt: skip
    return name


def _smallest(spec: RunSpec, name: str) -> int:
    if name == "images_per_sample":
        return 0
    if name == "sequence_length" and spec.images_per_sample:
        model = load_model(spec.model)
        return max(1, model.image_tokens(spec.image_size) * spec.images_per_sample)
    return 1


def _most(spec: RunSpec, name: str) -> tuple[int, str]:
    """The largest value that means anything, and why."""
    model = load_model(spec.model)
    if name == "images_per_sample":
        count = spec.sequence_length // model.image_tokens(spec.image_size)
        return min(count, 4096), f"no more images fit into {spec.sequence_length} tokens"
    if name == "sequence_length":
        positions = model.text.max_position_embeddings
        return positions, f"the model has {positions:,} positions"
    if name == "lora.rank":
        width = model.text.hidden_size
        return width, f"the model is {width:,} wide"
    return _MOST[name], "the most that a run spec takes"
