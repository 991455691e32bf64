"""Levers: single changes of a spec, each with the bytes it saves and the time it costs.

Every lever is answered by the same engine as the spec itself; nothing is estimated from a rule.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from planner.errors import VramwiseError
from planner.estimate import Estimate, device_of, estimate, fit_on, requirement
from planner.memory.program import run
from planner.memory.workspace import cublas_workspace_bytes
from planner.models.registry import load_model
from planner.spec import RunSpec
from planner.verdict import Verdict

SAME, ROUNDS, DIFFERENT, PROVISIONAL = (
    "", "other rounding", "changes what is learned", "provisional figures",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Change:
    """A change of fields by dotted name, and what it does to the training ("" for nothing)."""

    fields: Mapping[str, Any]
    effect: str = SAME

    @property
    def flags(self) -> str:
        """As typed: '--lora-rank 8'."""
        return " ".join(
            f"--{name.replace('.', '-').replace('_', '-')} {_typed(value)}"
            for name, value in self.fields.items()
        )


@dataclass(frozen=True, slots=True)
class Lever:
    """A change and its answer. saved_bytes: of device_required_bytes (negative: it takes more);
    slower: relative change of the seconds a sample (0.3: 30 % slower)."""

    flags: str
    effect: str
    spec: RunSpec
    device_required_bytes: int
    saved_bytes: int
    step_seconds: float
    slower: float
    verdict: Verdict


def apply(spec: RunSpec, fields: Mapping[str, Any]) -> RunSpec:
    """`spec` with fields changed by dotted name; the values are taken as valid."""
    changes: dict[str, Any] = {}
    for name, value in fields.items():
        outer, _, inner = name.partition(".")
        if inner:
            base = changes.get(outer) or getattr(spec, outer)
            changes[outer] = base.model_copy(update={inner: value})
        else:
            changes[outer] = value
    return spec.model_copy(update=changes)


def changes(spec: RunSpec) -> Iterator[Change]:
    """Every lever that applies, cheapest in effort and effect first."""
    for rule in _RULES:
        yield from rule(spec)


def levers(answer: Estimate) -> list[Lever]:
    """Every lever's answer, in the order of `changes`; what cannot be is left out."""
    found = []
    for change in changes(answer.spec):
        try:
            found.append(_answer(answer, change))
        except VramwiseError:  # not possible for this model or stack: no lever
            continue
    return found


def cheapest(answer: Estimate, most: int = 6) -> list[Lever]:
    """What to change: towards fitting, or where it fits, towards more speed or room.

    Ordered: those that make it fit before those that do not; among these what does not touch the
    training first; then by time lost, then by bytes saved.
    """
    useful = [lever for lever in levers(answer) if _is_useful(answer, lever)]
    rank = {"fits": 0, "tight": 1, "does_not_fit": 2}
    order: Callable[[Lever], tuple[Any, ...]]
    if answer.verdict == "fits":

        def order(lever: Lever) -> tuple[Any, ...]:
            return (lever.effect != SAME, lever.slower > 0, round(lever.slower, 2),
                    -lever.saved_bytes)  # fmt: skip
    else:

        def order(lever: Lever) -> tuple[Any, ...]:
            fitting = rank[lever.verdict]
            if fitting == 2:
                return (fitting, False, -lever.saved_bytes, lever.slower)
            return (fitting, lever.effect != SAME, round(lever.slower, 2), -lever.saved_bytes)

    return sorted(useful, key=order)[:most]


def answer_change(answer: Estimate, spec: RunSpec, flags: str, effect: str = SAME) -> Lever:
    """`spec` against `answer`'s: bytes saved, time lost."""
    model, device = load_model(spec.model), device_of(spec)
    program = run(spec, model)
    needed = requirement(spec, model, program, cublas_workspace_bytes(device.compute_capability))
    fit = fit_on(spec, device, program, needed)
    required = needed.required_bytes + fit.outside.bytes
    return Lever(
        flags=flags,
        effect=effect,
        spec=spec,
        device_required_bytes=required,
        saved_bytes=answer.device_required_bytes - required,
        step_seconds=fit.speed.step_s,
        slower=answer.tokens_per_second / fit.tokens_per_second - 1,
        verdict=fit.verdict,
    )


def _answer(answer: Estimate, change: Change) -> Lever:
    return answer_change(answer, apply(answer.spec, change.fields), change.flags, change.effect)


def _is_useful(answer: Estimate, lever: Lever) -> bool:
    """Saves a hundredth of the requirement; or, where there is room, time."""
    saves = lever.saved_bytes > answer.device_required_bytes // 100
    if answer.verdict != "fits":
        return saves
    return lever.verdict == "fits" and (saves or lever.slower < -0.03)


def _allocator(spec: RunSpec) -> Iterator[Change]:
    if not spec.expandable_segments:
        yield Change({"expandable_segments": True})


def _checkpointing(spec: RunSpec) -> Iterator[Change]:
    yield Change({"gradient_checkpointing": not spec.gradient_checkpointing})


def _batch(spec: RunSpec) -> Iterator[Change]:
    batch, steps = spec.micro_batch_size, spec.gradient_accumulation_steps
    if batch % 2 == 0:
        yield Change({"micro_batch_size": batch // 2, "gradient_accumulation_steps": steps * 2})
    if batch > 2:
        yield Change({"micro_batch_size": 1, "gradient_accumulation_steps": steps * batch})
    if steps % 2 == 0:
        yield Change({"micro_batch_size": batch * 2, "gradient_accumulation_steps": steps // 2})


def _optimizer(spec: RunSpec) -> Iterator[Change]:
    if spec.optimizer in ("adamw_torch", "adagrad", "rmsprop"):
        yield Change({"optimizer": "adamw_torch_fused"}, SAME if "adamw" in spec.optimizer else
                     DIFFERENT)  # fmt: skip
    if not spec.optimizer.endswith("8bit"):
        yield Change({"optimizer": "adamw_8bit"}, ROUNDS)
        yield Change({"optimizer": "paged_adamw_8bit"}, ROUNDS)
    elif not spec.optimizer.startswith("paged"):
        yield Change({"optimizer": f"paged_{spec.optimizer}"})


def _weights(spec: RunSpec) -> Iterator[Change]:
    if spec.precision == "fp32":
        yield Change({"precision": "bf16"}, ROUNDS)
    if spec.weights_dtype == "float32":
        yield Change({"weights_dtype": "bfloat16"}, ROUNDS)
    if spec.method == "full":
        yield Change({"method": "lora"}, DIFFERENT)
        return
    if spec.quantization in ("none", "int8"):
        yield Change({"quantization": "nf4"}, ROUNDS)
    if spec.quantization in ("nf4", "fp4") and not spec.double_quant:
        yield Change({"double_quant": True}, ROUNDS)
    if spec.quantization != "none":
        yield Change({"quantization": "none"}, ROUNDS)


def _adapter(spec: RunSpec) -> Iterator[Change]:
    if spec.method != "lora":
        return
    if spec.lora.dropout:
        yield Change({"lora.dropout": 0.0}, DIFFERENT)
    if spec.lora.rank >= 16:
        yield Change({"lora.rank": spec.lora.rank // 2}, DIFFERENT)
    if spec.lora.target_modules == "all-linear":
        yield Change({"lora.target_modules": ("q_proj", "v_proj")}, DIFFERENT)


def _attention(spec: RunSpec) -> Iterator[Change]:
    if spec.attention == "eager":
        yield Change({"attention": "sdpa"}, ROUNDS)


def _data(spec: RunSpec) -> Iterator[Change]:
    if spec.images_per_sample > 1:
        yield Change({"images_per_sample": spec.images_per_sample // 2}, DIFFERENT)
    if spec.sequence_length >= 256:
        yield Change({"sequence_length": spec.sequence_length // 2}, DIFFERENT)


def _stack(spec: RunSpec) -> Iterator[Change]:
    if spec.stack == "stock":
        yield Change({"stack": "lean"}, PROVISIONAL)


_RULES: tuple[Callable[[RunSpec], Iterator[Change]], ...] = (
    _allocator, _checkpointing, _batch, _optimizer, _weights, _adapter, _attention, _data, _stack,
)  # fmt: skip


def _typed(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return ",".join(value) if isinstance(value, tuple) else str(value)


__all__ = [
    "Change", "Lever", "answer_change", "apply", "changes", "cheapest", "estimate", "levers",
]  # fmt: skip
