"""The trained step: accumulation, checkpointing, NF4, and the measuring entry on a CPU."""

from __future__ import annotations

import argparse
import json

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit

from planner.errors import InputError
from planner.spec import spec_from_mapping
from recipes.lavin import measure
from recipes.lavin.build import build_lavin
from recipes.lavin.config import lavin_config
from recipes.lavin.step import LavinStep
from recipes.lavin.synthetic import random_batch


def _spec(**changes):
    values = {"model": "lavin-tiny", "quantization": "none", "weights_dtype": "float32",
              "precision": "fp32", "optimizer": "adamw_torch", "sequence_length": 32,
              "micro_batch_size": 2, "images_per_sample": 1}  # fmt: skip
    return spec_from_mapping(values | changes)


def _stepped(spec, batches, **config):
    built = build_lavin(spec, lavin_config("tiny", **config), "cpu")
    step = LavinStep(built, 4)
    losses = [step.step(batches).item() for _ in range(3)]
    return losses, {n: p.detach().clone() for n, p in built.model.trained_parameters().items()}


def test_a_checkpointed_step_is_the_plain_one_dropout_included() -> None:
    batches = [random_batch(_spec(), lavin_config("tiny"), 0)]
    plain, trained = _stepped(_spec(), batches)
    again, same = _stepped(_spec(gradient_checkpointing=True), batches)
    assert again == pytest.approx(plain, rel=1e-6)
    assert plain[0] > plain[-1]
    for name, values in trained.items():
        torch.testing.assert_close(same[name], values, atol=1e-6, rtol=1e-5)


def test_checkpointing_keeps_less() -> None:
    kept = []
    for checkpointing in (False, True):
        spec = _spec(gradient_checkpointing=checkpointing)
        built = build_lavin(spec, device="cpu")
        saved: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, saved=saved: (saved.append(t.numel()), t)[1], lambda t: t
        ):
            LavinStep(built, 1).forward(random_batch(spec, built.config, 0))
        kept.append(sum(saved))
    assert kept[1] < kept[0] / 2


def test_accumulated_parts_are_one_batch() -> None:
    config = lavin_config("tiny", dropout=0.0)
    whole = random_batch(_spec(micro_batch_size=4), config, 0)
    whole["labels"][0, :24] = -100  # parts with other numbers of answer tokens
    parts = [{k: v[i : i + 2] for k, v in whole.items()} for i in (0, 2)]
    one, trained = _stepped(_spec(), [whole], dropout=0.0)
    two, same = _stepped(_spec(), parts, dropout=0.0)
    assert two == pytest.approx(one, rel=1e-5)
    for name, values in trained.items():
        torch.testing.assert_close(same[name], values, atol=2e-5, rtol=1e-3)


def test_four_bits_are_the_decoder_layers_linears_alone() -> None:
    spec = _spec(quantization="nf4")
    built = build_lavin(spec, device="cpu")
    names = [n for n, m in built.model.named_modules() if isinstance(m, Linear4bit)]
    assert len(names) == 7 * built.config.text.num_hidden_layers
    assert all(name.startswith("language.model.layers.") for name in names)
    assert not any("adapter" in name for name in names)


def test_a_step_on_four_bits_is_one_on_the_weights_they_stand_for() -> None:
    spec = _spec(quantization="nf4")
    found = []
    for unpacked in (False, True):
        built = build_lavin(spec, lavin_config("tiny", dropout=0.0), "cpu")
        if unpacked:
            _unpack(built.model.language)
        step = LavinStep(built, 4)
        found.append([step.step([random_batch(spec, built.config, 0)]).item() for _ in range(3)])
    assert found[0] == pytest.approx(found[1], rel=1e-3)
    assert found[0][2] < found[0][0]


def _unpack(model) -> None:
    for layer in model.model.layers:
        for parent in (layer.self_attn, layer.mlp):
            for name, linear in list(parent.named_children()):
                if isinstance(linear, Linear4bit):
                    plain = torch.nn.Linear(linear.in_features, linear.out_features, bias=False)
                    weight = dequantize_4bit(linear.weight.data, linear.weight.quant_state)
                    plain.weight = torch.nn.Parameter(weight.float(), requires_grad=False)
                    setattr(parent, name, plain)


def test_eight_bit_weights_are_refused() -> None:
    with pytest.raises(InputError, match="quantization"):
        build_lavin(_spec(quantization="int8"), device="cpu")


@pytest.mark.parametrize(
    "flags",
    ["", "--quantization nf4 --checkpointing --accumulation 2 --optimizer adamw_8bit"],
)
def test_the_measuring_entry_prints_one_json_line(flags, capsys) -> None:
    arguments = [
        "--size",
        "tiny",
        "--sequence-length",
        "48",
        "--steps",
        "2",
        "--json",
        *flags.split(),
    ]
    assert measure.main([*arguments, "--device", "cpu"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["outcome"] == "ok"
    assert result["trainable_parameters"] == 15_930  # by hand: 3 and 6 adapters of 64, the rest
    assert result["peak_allocated_bytes"] == 0
    assert len(result["losses"]) == 2


def test_running_out_of_memory_is_an_outcome(monkeypatch) -> None:
    def fail(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(measure, "build_lavin", fail)
    arguments: argparse.Namespace = measure._parser().parse_args(["--size", "tiny"])
    assert measure.measure(arguments)["outcome"] == "oom"
    assert measure.measure(arguments)["during"] == "build"


@pytest.mark.parametrize("needed", [10 << 30, 11 << 30, 13 << 30])
def test_the_smallest_cap_is_bracketed(needed) -> None:
    found = measure.smallest_cap(lambda cap: cap >= needed, 10 << 30, 12 << 30)
    required = found["allocator_required_bytes"]
    assert needed <= required <= needed * 1.03 + (64 << 20)
