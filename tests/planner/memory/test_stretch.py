"""Four layers stretched to all equal all layers run: events, peaks, states, work."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.errors import VramwiseError
from planner.estimate import estimate
from planner.memory.program import run
from planner.memory.requirement import reserve
from planner.memory.storage import Recorder
from planner.models.registry import load_model
from planner.spec import spec_from_mapping
from planner.units import MIB

LLAVA = "llava-hf/llava-1.5-7b-hf"
SPECS: list[dict[str, Any]] = [
    {},
    {"gradient_checkpointing": True, "gradient_accumulation_steps": 2, "optimizer": "adamw_torch"},
    {"lora": {"target_modules": ["lm_head"]}},
    {"method": "full", "quantization": "none"},
    {"quantization": "int8"},
    {"model": LLAVA, "images_per_sample": 1, "sequence_length": 1024},
    {"model": "facebook/chameleon-30b", "gradient_checkpointing": True, "lora": {"dropout": 0.0}},
    {"model": "Qwen/Qwen2.5-0.5B", "method": "full", "quantization": "none",
     "optimizer": "adafactor"},
    {"model": "lavin-7b", "images_per_sample": 1, "optimizer": "paged_adamw_8bit"},
    {"model": "lavin-13b", "images_per_sample": 1, "gradient_checkpointing": True,
     "gradient_accumulation_steps": 2, "versions": {"bitsandbytes": "0.39.0"}},
]  # fmt: skip
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head")
TEXT = ("huggyllama/llama-7b", "Qwen/Qwen3-1.7B", "google/gemma-2b", "facebook/chameleon-7b")
# The key-value cache and a custom function's attributes are freed in one sweep, in another order.
SWEPT = (SPECS[4], SPECS[5])


@pytest.mark.parametrize("values", SPECS, ids=str)
def test_stretched_step_equals_whole_step(values: dict[str, Any]) -> None:
    spec = spec_from_mapping({"model": "facebook/chameleon-7b", **values})
    model = load_model(spec.model)
    whole, stretched = run(spec, model, Recorder()), run(spec, model)
    assert len(stretched.recorder.events) == len(whole.recorder.events)
    if values not in SWEPT:
        assert list(stretched.recorder.events) == whole.recorder.events
    assert _blocks(stretched.recorder) == _blocks(whole.recorder)
    assert _peaks(stretched.recorder) == _peaks(whole.recorder)
    assert stretched.states == whole.states
    assert stretched.work.micro_batch.counters() == pytest.approx(
        whole.work.micro_batch.counters(), rel=1e-9
    )
    assert reserve(stretched, 32 * MIB, False) == reserve(whole, 32 * MIB, False)


@settings(max_examples=40, deadline=None)
@given(
    name=st.sampled_from(TEXT), targets=st.sets(st.sampled_from(LINEARS), min_size=1),
    quantization=st.sampled_from(["none", "nf4"]), checkpointed=st.booleans(),
    attention=st.sampled_from(["sdpa", "eager"]), stack=st.sampled_from(["stock", "lean"]),
    dropout=st.sampled_from([0.0, 0.1]), accumulation=st.sampled_from([1, 2]),
)  # fmt: skip
def test_any_choice_of_adapters_is_stretched_to_the_whole(
    name: str, targets: set[str], quantization: str, checkpointed: bool, attention: str,
    stack: str, dropout: float, accumulation: int,
) -> None:  # fmt: skip
    """Where little of the first layer trains, what all layers share goes with the second one."""
    model = load_model(name)
    spec = spec_from_mapping({
        "model": name, "quantization": quantization, "gradient_checkpointing": checkpointed,
        "stack": stack, "attention": attention, "gradient_accumulation_steps": accumulation,
        "lora": {"target_modules": sorted(targets), "dropout": dropout},
    })  # fmt: skip
    whole, stretched = run(spec, model, Recorder()), run(spec, model)
    assert _live(stretched.recorder) == _live(whole.recorder)
    assert _peaks(stretched.recorder) == _peaks(whole.recorder)
    assert stretched.states == whole.states


def test_an_optimizer_that_drops_gradients_runs_every_layer() -> None:
    spec = spec_from_mapping({"model": TEXT[0], "optimizer": "galore_adamw_8bit"})
    model = load_model(spec.model)
    assert _peaks(run(spec, model).recorder) == _peaks(run(spec, model, Recorder()).recorder)


@pytest.mark.parametrize(("target", "told"), [
    ("linear_1", "no trainable parameter gets a gradient"),  # no picture in the batch
    ("patch_embedding", "is a convolution, whose adapter the planner does not model"),
])  # fmt: skip
def test_adapters_that_cannot_be_planned_are_told(target: str, told: str) -> None:
    spec = spec_from_mapping({
        "model": LLAVA, "quantization": "none", "lora": {"target_modules": [target]},
    })  # fmt: skip
    with pytest.raises(VramwiseError, match=told):
        run(spec, load_model(LLAVA))


def test_a_run_beyond_any_machine_is_answered() -> None:
    answer = estimate(spec_from_mapping({
        "model": "google/gemma-3-27b-it", "method": "full", "weights_dtype": "float32",
        "attention": "eager", "micro_batch_size": 96, "sequence_length": 8192, "device": "h200",
    }))  # fmt: skip
    assert answer.verdict == "does_not_fit"
    assert answer.allocator_required_bytes > 64 << 40


def _live(recorder: Recorder) -> list[tuple[int, int]]:
    """(bytes, blocks) live after each event; KeyError where a block is released twice."""
    live: set[int] = set()
    size, found = 0, []
    for index in recorder.events:
        if index >= 0:
            live.add(index)
            size += recorder.sizes[index]
        else:
            live.remove(~index)
            size -= recorder.sizes[~index]
        found.append((size, len(live)))
    return found


def _blocks(recorder: Recorder) -> list[tuple[str, str, int]]:
    """What there is, the layers' numbers left out: a stretched layer has its template's names."""
    return sorted(
        (re.sub(r"layers\.\d+", "layers", block.module), block.op, block.nbytes)
        for block in recorder.blocks
    )


def _peaks(recorder: Recorder) -> list[tuple[str, int, int]]:
    return [(instant.name, instant.peak_bytes, instant.start) for instant in recorder.instants]
