"""Levers: single changes of a spec, each with the bytes it saves and the time it costs.

Every lever is answered by the same engine as the spec itself; nothing is estimated from a rule.
"""

# Annotations stay objects here: named tuples would compile each string at import.
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from planner.answer import Estimate
from planner.errors import VramwiseError
from planner.estimate import check, device_of, fit_on, host_of, requirement
from planner.memory.program import Program, run
from planner.memory.workspace import HANDLES_TRAINING, cublas_workspace_bytes
from planner.models.registry import load_model
from planner.non_torch import non_torch
from planner.spec import RunSpec
from planner.throughput.model import step_time
from planner.verdict import Verdict, worst

SAME, ROUNDS, DIFFERENT, RECIPES = (
    "", "other rounding", "changes what is learned", "by `vramwise train`",
)  # fmt: skip
_RANK = {"fits": 0, "tight": 1, "does_not_fit": 2}
_SPARE = 2  # weighed beyond those shown: the allocator may turn an order


class Change(NamedTuple):
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


class Lever(NamedTuple):
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
    return [_weigh(answer, outline) for outline in _outlines(answer)]


def cheapest(answer: Estimate, most: int | None = None) -> list[Lever]:
    """What to change: towards fitting, or where it fits, towards more speed or room.

    Ordered: those that make it fit before those that do not; among these what does not touch the
    training first; then by time lost, then by bytes saved. The live bytes, known without replaying
    the allocator, choose which are weighed in full. most: None is 6, or 3 where the run fits.
    """
    if most is None:
        most = 3 if answer.verdict == "fits" else 6
    outlines = sorted(_outlines(answer), key=lambda o: _order(answer, o.verdict, o))
    chosen = [o for o in outlines if _is_useful(answer, o, o.verdict) or not o.saved_bytes]
    best: list[Lever] = []
    for outline in chosen[: most + _SPARE]:
        if len(best) == most and not _may_precede(answer, outline, best[-1]):
            continue
        lever = _weigh(answer, outline)
        if _is_useful(answer, lever, lever.verdict):
            best = sorted([*best, lever], key=lambda lever: _order(answer, lever.verdict, lever))
            best = best[:most]
    return best


class _Outline(NamedTuple):
    """A change whose step was run: its live bytes and time, and the best verdict it can have."""

    change: Change
    spec: RunSpec
    program: Program
    saved_bytes: int
    slower: float
    verdict: Verdict

    @property
    def effect(self) -> str:
        return self.change.effect


def _outlines(answer: Estimate) -> list[_Outline]:
    found = []
    for change in changes(answer.spec):
        if answer.verdict == "fits" and change.effect == DIFFERENT:
            continue  # what is learned need not change where there is room
        try:
            found.append(_outline(answer, change))
        except VramwiseError:  # not possible for this model or stack: no lever
            continue
    return found


def _outline(answer: Estimate, change: Change) -> _Outline:
    spec = apply(answer.spec, change.fields)
    model, device = load_model(spec.model), device_of(spec)
    check(spec, model)
    program = run(spec, model)
    workspace = HANDLES_TRAINING * cublas_workspace_bytes(device.compute_capability)
    live = int(program.static_bytes + program.peak.peak_bytes + workspace)
    outside = non_torch(device, spec, program.states.paged_bytes)
    seconds = step_time(spec, device, program.work).step_s
    tokens = spec.micro_batch_size * spec.sequence_length * spec.gradient_accumulation_steps
    best: Verdict = (
        "fits" if live + outside.high_bytes <= answer.device_total_bytes else "does_not_fit"
    )
    best = worst(best, host_of(spec, device, program).verdict)
    saved = answer.peak_allocated_bytes + answer.paged_bytes - live - program.states.paged_bytes
    slower = answer.tokens_per_second / (tokens / seconds) - 1
    return _Outline(change, spec, program, saved, slower, best)


def _weigh(answer: Estimate, outline: _Outline) -> Lever:
    """The outline's whole answer: the allocator replayed, the card compared."""
    spec, program = outline.spec, outline.program
    model, device = load_model(spec.model), device_of(spec)
    needed = requirement(spec, model, program, cublas_workspace_bytes(device.compute_capability))
    fit = fit_on(spec, device, program, needed)
    required = needed.required_bytes + fit.outside.bytes
    return Lever(
        flags=outline.change.flags,
        effect=outline.change.effect,
        spec=spec,
        device_required_bytes=required,
        saved_bytes=answer.device_required_bytes - required,
        step_seconds=fit.speed.step_s,
        slower=answer.tokens_per_second / fit.tokens_per_second - 1,
        verdict=fit.verdict,
    )


def _order(answer: Estimate, verdict: Verdict, lever: Lever | _Outline) -> tuple[Any, ...]:
    slower, saved = round(lever.slower, 2), -lever.saved_bytes
    if answer.verdict == "fits":
        return (lever.effect != SAME, slower > 0, slower, saved)
    rank = _RANK[verdict]
    if rank == _RANK["does_not_fit"]:
        return (rank, False, saved, slower)
    return (rank, lever.effect != SAME, slower, saved)


def _may_precede(answer: Estimate, outline: _Outline, last: Lever) -> bool:
    """Whether the outline, weighed, may come before `last`. Its bytes may differ then, and its
    verdict; its time does not. What does not fit by its live bytes may be tight at best."""
    best: Verdict = "tight" if outline.verdict == "does_not_fit" else outline.verdict
    bound, known = _order(answer, best, outline), _order(answer, last.verdict, last)
    return bool(bound[:3] <= known[:3])


def _is_useful(answer: Estimate, lever: Lever | _Outline, verdict: Verdict) -> bool:
    """Saves a hundredth of the requirement; or, where there is room, time; or turns the verdict,
    where the machine's own memory decides it."""
    if answer.verdict != answer.device_verdict:  # the host decides
        return _RANK[verdict] < _RANK[answer.verdict]
    saves = lever.saved_bytes > answer.device_required_bytes // 100
    if answer.verdict != "fits":
        return saves
    return verdict == "fits" and (saves or lever.slower < -0.03)


def _allocator(spec: RunSpec) -> Iterator[Change]:
    if not spec.expandable_segments and spec.stack == "stock":
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
    if spec.method != "lora" or spec.adapter != "lora":
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
        yield Change({"stack": "lean"}, RECIPES)


_RULES: tuple[Callable[[RunSpec], Iterator[Change]], ...] = (
    _allocator, _checkpointing, _batch, _optimizer, _weights, _adapter, _attention, _data, _stack,
)  # fmt: skip


def _typed(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return ",".join(value) if isinstance(value, tuple) else str(value)
