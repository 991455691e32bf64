"""What must always hold, on drawn specs of a small model."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from planner.answer import Estimate
from planner.estimate import estimate
from planner.levers import apply
from planner.spec import RunSpec
from planner.units import MIB
from tests.planner.tiny import tiny_spec

FIELDS: dict[str, st.SearchStrategy[Any]] = {
    "micro_batch_size": st.integers(1, 12),
    "sequence_length": st.integers(1, 700),
    "gradient_accumulation_steps": st.integers(1, 4),
    "gradient_checkpointing": st.booleans(),
    "optimizer": st.sampled_from(
        ["adamw_torch", "adamw_torch_fused", "adamw_8bit", "paged_adamw_8bit", "adafactor", "sgd",
         "lion_8bit", "paged_lion_32bit"]
    ),
    "precision": st.sampled_from(["bf16", "fp16", "fp32"]),
    "weights_dtype": st.sampled_from(["bfloat16", "float32"]),
    "attention": st.sampled_from(["sdpa", "eager"]),
    "expandable_segments": st.booleans(),
    "evaluation_batch_size": st.sampled_from([0, 3]),
    "max_grad_norm": st.sampled_from([0.0, 1.0]),
    "device": st.sampled_from(["rtx-3090", "h200", "t4"]),
}  # fmt: skip
LORA = st.fixed_dictionaries({
    "rank": st.sampled_from([1, 8, 33, 128]),
    "dropout": st.sampled_from([0.0, 0.05]),
    "target_modules": st.sampled_from(["all-linear", "q_proj,v_proj", "lm_head", "down_proj"]),
})  # fmt: skip
METHODS = st.sampled_from(
    [("lora", "none"), ("lora", "nf4"), ("lora", "fp4"), ("lora", "int8"), ("full", "none")]
)

drawn = settings(
    max_examples=40, deadline=None, derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip


@st.composite
def specs(draw: st.DrawFn) -> dict[str, Any]:
    """Fields of a run spec."""
    fields = {name: draw(values) for name, values in FIELDS.items()}
    method, quantization = draw(METHODS)
    return {**fields, "method": method, "quantization": quantization, "lora": draw(LORA)}


def _grown(answer: Estimate) -> int:
    return answer.peak_allocated_bytes + answer.paged_bytes


@drawn
@given(fields=specs())
def test_answer_is_consistent(tiny: str, fields: dict[str, Any]) -> None:
    answer = estimate(tiny_spec(tiny, **fields))
    assert sum(term.bytes for term in answer.terms) == answer.peak_allocated_bytes
    assert all(term.bytes >= 0 for term in answer.terms)
    assert answer.resident_bytes <= answer.peak_allocated_bytes <= answer.peak_reserved_bytes
    assert answer.peak_allocated_bytes <= answer.allocator_required_bytes
    low, high = answer.allocator_required_interval_bytes
    assert low <= answer.allocator_required_bytes <= high
    low, high = answer.device_required_interval_bytes
    assert low <= answer.device_required_bytes <= high
    required = answer.allocator_required_bytes + answer.non_torch_bytes
    assert answer.device_required_bytes == required
    assert answer.headroom_bytes == answer.device_total_bytes - high
    assert answer.peak_instant in answer.instants
    assert answer.parameters.total == sum(answer.parameters.by_component.values())
    tokens = (fields["micro_batch_size"] * fields["sequence_length"]
              * fields["gradient_accumulation_steps"])  # fmt: skip
    assert answer.tokens_per_second * answer.step_seconds == pytest.approx(tokens)


@drawn
@given(fields=specs(), more=st.integers(1, 64),
       name=st.sampled_from(["micro_batch_size", "sequence_length", "lora.rank"]))  # fmt: skip
def test_peak_never_falls_as_sizes_grow(
    tiny: str, fields: dict[str, Any], more: int, name: str
) -> None:
    spec = tiny_spec(tiny, **fields)
    larger = apply(spec, {name: _get(spec, name) + more})
    assert _grown(estimate(larger)) >= _grown(estimate(spec))


@drawn
@given(fields=specs(), rank=st.integers(1, 255), more=st.integers(1, 64))
def test_trainable_parameters_grow_with_the_rank(
    tiny: str, fields: dict[str, Any], rank: int, more: int
) -> None:
    spec = apply(tiny_spec(tiny, **{**fields, "method": "lora"}), {"lora.rank": rank})
    one, other = estimate(spec), estimate(apply(spec, {"lora.rank": rank + more}))
    assert other.parameters.trainable > one.parameters.trainable
    assert one.parameters.trainable * (rank + more) == other.parameters.trainable * rank


@drawn
@given(fields=specs())
def test_checkpointing_saves_where_every_layer_is_crossed(
    tiny: str, fields: dict[str, Any]
) -> None:
    """With adapters on every layer a gradient crosses them all, so nothing saved can grow."""
    lora = {**fields["lora"], "target_modules": "all-linear"}
    base = {**fields, "lora": lora, "sequence_length": max(fields["sequence_length"], 16)}
    off = estimate(tiny_spec(tiny, **{**base, "gradient_checkpointing": False}))
    on = estimate(tiny_spec(tiny, **{**base, "gradient_checkpointing": True}))
    assert _saved(on) <= _saved(off)


@drawn
@given(fields=specs(), memory=st.integers(20, 4000), more=st.integers(0, 2000))
def test_verdict_is_monotone_in_memory(
    tiny: str, fields: dict[str, Any], memory: int, more: int
) -> None:
    order = ["does_not_fit", "tight", "fits"]
    spec = tiny_spec(tiny, **fields)
    small = estimate(apply(spec, {"device_memory": memory * MIB}))
    large = estimate(apply(spec, {"device_memory": (memory + more) * MIB}))
    assert order.index(small.verdict) <= order.index(large.verdict)
    assert small.device_required_bytes == large.device_required_bytes


@drawn
@given(fields=specs())
def test_same_spec_same_answer(tiny: str, fields: dict[str, Any]) -> None:
    spec = tiny_spec(tiny, **fields)
    assert estimate(spec) == estimate(spec)


@drawn
@given(fields=specs())
def test_what_does_not_apply_is_ignored(tiny: str, fields: dict[str, Any]) -> None:
    """double_quant without 4 bits, the adapter of a full fine-tune."""
    if fields["quantization"] in ("nf4", "fp4"):
        return
    spec = tiny_spec(tiny, **fields)
    changes: dict[str, Any] = {"double_quant": not spec.double_quant}
    if spec.method == "full":
        changes["lora.rank"] = spec.lora.rank + 1
    one, other = estimate(spec), estimate(apply(spec, changes))
    assert one.device_required_bytes == other.device_required_bytes
    assert one.terms == other.terms


def _saved(answer: Estimate) -> int:
    return sum(term.bytes for term in answer.terms if term.category == "saved_activations")


def _get(spec: RunSpec, dotted: str) -> int:
    value: Any = spec
    for part in dotted.split("."):
        value = getattr(value, part)
    return int(value)
