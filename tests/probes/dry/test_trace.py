"""What a trace says of tiny models, against counts made by hand or by torch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from planner.errors import InputError, UnsupportedError
from probes.dry.events import live_bytes, live_storages
from probes.dry.target import Target
from probes.dry.trace import trace
from tests.probes.dry.conftest import SHAPE, make_spec


def _linears(config: Any) -> list[tuple[str, int]]:
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    named = model.named_modules()
    return [(n, m.weight.numel()) for n, m in named if isinstance(m, torch.nn.Linear)]


FULL = {"method": "full", "quantization": "none"}


def _up(size: int) -> int:
    return -(-size // 512) * 512


def test_resident_is_every_parameter_and_buffer_rounded(llama: Any) -> None:
    traced = trace(make_spec(**FULL), config=llama)
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(llama).to(torch.bfloat16)
    expected = sum(_up(p.numel() * 2) for p in model.parameters())
    expected += sum(_up(b.numel() * 4) for b in model.buffers())
    assert traced.resident_bytes == expected
    assert traced.total_parameters == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("optimizer", "bytes_a_parameter"),
    [("adamw_torch_fused", 4), ("adamw_torch", 4), ("adamw_8bit", 2), ("lion_32bit", 4),
     ("sgd", 0), ("paged_adamw_8bit", 0), ("rmsprop", 2)],
)  # fmt: skip
def test_optimizer_states(llama: Any, optimizer: str, bytes_a_parameter: int) -> None:
    llama.vocab_size = 256  # the embedding keeps 32-bit states in an 8-bit optimizer
    traced = trace(make_spec(**FULL, optimizer=optimizer), config=llama)
    left = live_storages([*traced.load, *traced.events])
    states = sum(e.size_bytes for e in left if e.category == "optimizer_states")
    assert states / traced.total_parameters == pytest.approx(bytes_a_parameter, abs=0.45)


def test_foreach_adamw_holds_a_second_set_of_states_while_it_updates(llama: Any) -> None:
    foreach, fused = (
        trace(make_spec(**FULL, optimizer=name), config=llama)
        for name in ("adamw_torch", "adamw_torch_fused")
    )
    wanted = 2 * foreach.total_parameters  # bf16, the square roots
    rooted = [e for e in foreach.events if "foreach_sqrt" in e.op and e.kind == "alloc"]
    assert sum(e.size_bytes for e in rooted if e.step == 2) == pytest.approx(wanted, rel=0.01)
    assert not [e for e in fused.events if "foreach_sqrt" in e.op]


def test_checkpointing_saves_one_layer_input(llama: Any) -> None:
    plain, checkpointed = (
        trace(make_spec(quantization="none", gradient_checkpointing=on), config=llama)
        for on in (False, True)
    )
    assert checkpointed.peak_live_bytes < plain.peak_live_bytes
    assert {e.phase for e in checkpointed.events} - {e.phase for e in plain.events} == {"recompute"}


def test_eager_saves_the_probabilities_that_sdpa_does_not(llama: Any) -> None:
    eager, sdpa = (
        trace(make_spec(attention=name, sequence_length=512), config=llama)
        for name in ("eager", "sdpa")
    )
    shape = (2, 8, 512, 512)
    assert any(e.shape == shape and e.category == "saved_activations" for e in eager.events)
    assert not any(e.shape == shape for e in sdpa.events)


def test_flash_attention_2_holds_what_sdpa_holds(llama: Any) -> None:
    flash, sdpa = (
        trace(make_spec(attention=name), config=llama) for name in ("flash_attention_2", "sdpa")
    )
    assert flash.peak_live_bytes == pytest.approx(sdpa.peak_live_bytes, rel=0.01)


def test_int8_names_what_depends_on_the_data(llama: Any) -> None:
    traced = trace(make_spec(quantization="int8"), config=llama)
    assert any("int8" in name for name in traced.unknown_operations)
    linears = 2 * (4 * 512 * 512 + 3 * 512 * 1024)
    codes = sum(e.size_bytes for e in live_storages(traced.load) if e.dtype == "int8")
    assert codes == linears


def test_nothing_leaks_from_step_to_step(llama: Any) -> None:
    two, four = (trace(make_spec(), config=llama, steps=steps) for steps in (2, 4))
    assert live_bytes([*two.load, *two.events]) == live_bytes([*four.load, *four.events])
    assert two.peak_live_bytes == four.peak_live_bytes


def test_live_at_peak_sums_to_the_peak(llama: Any) -> None:
    traced = trace(make_spec(evaluation_batch_size=8), config=llama)
    rows = traced.live_at_peak()
    assert sum(row.size_bytes for row in rows) == traced.peak_live_bytes
    assert {"parameters", "logits", "saved_activations", "workspace"} <= {r.category for r in rows}
    assert (traced.eval_peak_bytes or 0) > traced.resident_bytes


def test_accumulation_keeps_its_gradients(llama: Any) -> None:
    one, many = (
        trace(make_spec(gradient_accumulation_steps=count), config=llama) for count in (1, 4)
    )
    adapters = one.trainable_parameters * 4
    assert many.peak_live_bytes - one.peak_live_bytes >= adapters


def test_workspace_follows_the_card(llama: Any) -> None:
    hopper = trace(make_spec(), config=llama)
    ampere = trace(make_spec(), config=llama, target=Target(8, 0, 108))
    assert hopper.peak_live_bytes - ampere.peak_live_bytes == 2 * (32 * 1024**2 - 8_519_680)


@pytest.mark.parametrize("name", ["Olmo2", "GPTNeoX", "Granite"])
def test_models_that_no_table_names(name: str) -> None:
    config = getattr(transformers, f"{name}Config")(**SHAPE)
    traced = trace(make_spec(lora={"target_modules": "all-linear"}), config=config)
    assert traced.unknown_operations == ()
    frozen = [e for e in live_storages(traced.load) if e.dtype == "uint8" and len(e.shape) == 2]
    linears = [m for m in _linears(config) if "lm_head" not in m[0] and "embed_out" not in m[0]]
    assert sum(e.size_bytes for e in frozen) == sum(count // 2 for _, count in linears)


def test_an_unknown_multimodal_model_is_asked_for_its_tokens() -> None:
    text = {"model_type": "cohere2", **SHAPE, "vocab_size": 256_000}
    vision = {"model_type": "siglip_vision_model", "num_hidden_layers": 2, "image_size": 112,
              "patch_size": 14, "hidden_size": 128, "num_attention_heads": 4}  # fmt: skip
    config = transformers.AyaVisionConfig(text_config=text, vision_config=vision)
    traced = trace(make_spec(images_per_sample=1), config=config)
    assert any(e.shape[-3:] == (3, 112, 112) and e.phase == "inputs" for e in traced.events)
    assert any("vision_tower" in e.module for e in traced.events)


def test_images_that_do_not_fit_are_refused() -> None:
    spec = make_spec(model="chameleon-7b", images_per_sample=1, sequence_length=512)
    with pytest.raises(InputError, match="too short"):
        trace(spec, layers=1)


def test_a_model_that_is_not_there_is_named() -> None:
    with pytest.raises(InputError, match="cannot be built"):
        trace(make_spec(model="no/such-model"))


def test_a_text_model_takes_no_images(llama: Any) -> None:
    with pytest.raises((InputError, UnsupportedError)):
        trace(make_spec(images_per_sample=1), config=llama)
