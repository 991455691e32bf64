"""The lean step against the stock Trainer, step by step, on tiny models of the real families."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor

from recipes.build import Built, build
from recipes.lean import LeanOptions, LeanStep, reached_layers
from recipes.stock import stock_trainer
from recipes.synthetic import RandomSamples, stack
from tests.recipes.tiny import tiny_chameleon, tiny_llama, tiny_spec

STEPS = 4


def _stock_losses(built: Built, spec, samples, folder: Path) -> list[float]:
    trainer = stock_trainer(
        built, spec, samples, output_dir=folder, collate=stack, max_steps=STEPS,
        logging_nan_inf_filter=False, train_sampling_strategy="sequential",
    )  # fmt: skip
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def _batches(spec, samples, step: int) -> list[dict[str, Tensor]]:
    size, parts = spec.micro_batch_size, spec.gradient_accumulation_steps
    first = step * size * parts
    return [
        stack([samples[(first + p * size + i) % len(samples)] for i in range(size)])
        for p in range(parts)
    ]


def _lean_losses(built: Built, spec, samples, **options) -> tuple[list[float], LeanStep]:
    lean = LeanStep(built, spec, total_steps=STEPS, options=LeanOptions(**options))
    return [lean.step(_batches(spec, samples, i)).item() for i in range(STEPS)], lean


def _compare(config, tmp_path: Path, *, tolerance: float, options=None, **values) -> LeanStep:
    spec = tiny_spec(schedule={"max_steps": STEPS, "learning_rate": 1e-2}, **values)
    stock = build(spec, config=config, device="cpu")
    lean = build(spec.model_copy(update={"stack": "lean"}), config=config, device="cpu")
    lean.model.load_state_dict(copy.deepcopy(stock.model.state_dict()), strict=False)
    samples = RandomSamples(spec, stock.config, STEPS * spec.micro_batch_size * 2)
    wanted = _stock_losses(stock, spec, samples, tmp_path)
    found, step = _lean_losses(lean, lean.spec, samples, **(options or {}))
    assert len(wanted) == STEPS
    assert wanted[0] - wanted[-1] > 0.01 or wanted != found[0]
    assert found == pytest.approx(wanted, rel=tolerance)
    trained = dict(stock.model.named_parameters())
    for name, parameter in step.model.named_parameters():
        if parameter.requires_grad and tolerance < 1e-4:
            assert torch.allclose(parameter, trained[name].to(parameter), atol=2e-4), name
    return step


@pytest.mark.parametrize("maker", [tiny_chameleon, tiny_llama])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_lean_losses_equal_stock_in_fp32(maker, checkpointing, accumulation, tmp_path) -> None:
    _compare(
        maker(), tmp_path, tolerance=1e-5, gradient_checkpointing=checkpointing,
        gradient_accumulation_steps=accumulation,
    )  # fmt: skip


@pytest.mark.parametrize("targets", [["lm_head"], ["q_proj", "lm_head"], ["up_proj"]])
def test_lean_losses_equal_stock_for_other_targets(targets, tmp_path) -> None:
    lora = {"rank": 4, "dropout": 0.0, "target_modules": targets}
    _compare(tiny_chameleon(), tmp_path, tolerance=1e-5, lora=lora, gradient_checkpointing=True)


def test_lean_losses_equal_stock_with_images(tmp_path) -> None:
    _compare(tiny_chameleon(), tmp_path, tolerance=1e-5, images_per_sample=1)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_lean_losses_equal_stock_in_full(checkpointing, tmp_path) -> None:
    _compare(tiny_llama(), tmp_path, tolerance=1e-5, method="full",
             gradient_checkpointing=checkpointing)  # fmt: skip


def test_lean_losses_equal_stock_with_nf4(tmp_path) -> None:
    _compare(
        tiny_chameleon(), tmp_path, tolerance=1e-5, quantization="nf4", gradient_checkpointing=True
    )


def test_lean_losses_equal_stock_with_int8(tmp_path) -> None:
    _compare(tiny_chameleon(), tmp_path, tolerance=1e-3, quantization="int8")


def test_lean_losses_near_stock_in_bf16(tmp_path) -> None:
    _compare(
        tiny_chameleon(), tmp_path, tolerance=5e-3, quantization="nf4", precision="bf16",
        weights_dtype="bfloat16", gradient_checkpointing=True,
    )  # fmt: skip


def test_sub_batches_change_nothing(tmp_path) -> None:
    _compare(tiny_llama(), tmp_path, tolerance=1e-5, options={"sub_batches": 2})


def test_peft_path_changes_nothing(tmp_path) -> None:
    _compare(tiny_llama(), tmp_path, tolerance=1e-5, gradient_checkpointing=True,
             options={"fuse_adapters": False})  # fmt: skip


@pytest.mark.slow
def test_compiled_layers_change_nothing(tmp_path) -> None:
    _compare(tiny_chameleon(), tmp_path, tolerance=1e-5, gradient_checkpointing=True,
             options={"compile": True})  # fmt: skip


def test_recomputation_draws_the_same_dropout() -> None:
    lora = {"rank": 4, "dropout": 0.3, "target_modules": "all-linear"}
    losses, grads = [], []
    for checkpointing in (False, True):
        spec = tiny_spec(stack="lean", lora=lora, gradient_checkpointing=checkpointing)
        built = build(spec, config=tiny_chameleon(), device="cpu")
        samples = RandomSamples(spec, built.config, 16)
        found, step = _lean_losses(built, spec, samples)
        losses.append(found)
        grads.append([p.detach().clone() for p in step.trained])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert all(torch.allclose(x, y, atol=1e-5) for x, y in zip(*grads, strict=True))


def test_only_reached_layers_count() -> None:
    for targets, reached in ((["lm_head"], 0), ("all-linear", 2)):
        spec = tiny_spec(lora={"rank": 4, "target_modules": targets})
        assert reached_layers(build(spec, config=tiny_llama(), device="cpu")) == reached


def test_head_adapter_runs_no_backward_through_the_backbone() -> None:
    spec = tiny_spec(stack="lean", gradient_checkpointing=True,
                     lora={"rank": 4, "target_modules": ["lm_head"]})  # fmt: skip
    built = build(spec, config=tiny_llama(), device="cpu")
    calls = []
    attention = built.base.model.layers[0].self_attn
    attention.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    _lean_losses(built, spec, RandomSamples(spec, built.config, 16))
    assert calls == [False] * STEPS


def test_resumed_losses_are_bit_equal() -> None:
    lora = {"rank": 4, "dropout": 0.1, "target_modules": "all-linear"}
    spec = tiny_spec(stack="lean", lora=lora)
    samples = RandomSamples(spec, tiny_chameleon(), 16)
    whole, _ = _lean_losses(build(spec, config=tiny_chameleon(), device="cpu"), spec, samples)
    first = LeanStep(build(spec, config=tiny_chameleon(), device="cpu"), spec, total_steps=STEPS)
    head = [first.step(_batches(spec, samples, i)).item() for i in range(2)]
    state = copy.deepcopy((first.model.state_dict(), first.state_dict()))
    second = LeanStep(build(spec, config=tiny_chameleon(), device="cpu"), spec, total_steps=STEPS)
    second.model.load_state_dict(state[0])
    second.load_state_dict(state[1])
    tail = [second.step(_batches(spec, samples, i)).item() for i in range(2, STEPS)]
    assert head + tail == whole


def test_evaluation_is_the_models_own_loss() -> None:
    spec = tiny_spec(stack="lean")
    built = build(spec, config=tiny_chameleon(), device="cpu")
    lean = LeanStep(built, spec)
    batch = _batches(spec, RandomSamples(spec, built.config, 16), 0)[0]
    total, count = lean.evaluate(batch)
    built.model.eval()
    assert (total / count).item() == pytest.approx(built.model(**batch).loss.item(), rel=1e-5)
