"""The stock stack is Trainer with the reference workload's settings; its phases nest."""

from __future__ import annotations

import pytest

from recipes.build import build
from recipes.models import chameleon_vocabulary_map, load_config, model_class
from recipes.stock import stock_trainer, training_arguments
from recipes.synthetic import RandomSamples, image_tokens, stack
from tests.recipes.tiny import tiny_chameleon, tiny_spec


def test_arguments_are_the_specs(tmp_path) -> None:
    spec = tiny_spec(precision="bf16", weights_dtype="bfloat16", gradient_checkpointing=True,
                     gradient_accumulation_steps=3, optimizer="paged_adamw_8bit",
                     schedule={"warmup_steps": 2, "max_steps": 7})  # fmt: skip
    found = training_arguments(spec, tmp_path, on_cpu=True)
    assert (found.bf16, found.fp16, found.max_steps, found.warmup_steps) == (True, False, 7, 2)
    assert found.gradient_checkpointing_kwargs == {"use_reentrant": False}
    assert found.optim == "paged_adamw_8bit"
    assert found.max_grad_norm == 1.0
    assert found.per_device_eval_batch_size == 8


@pytest.mark.parametrize("images", [0, 1])
def test_phases_nest_and_repeat_by_micro_batch(images, tmp_path) -> None:
    spec = tiny_spec(gradient_accumulation_steps=2, images_per_sample=images)
    built = build(spec, config=tiny_chameleon(), device="cpu")
    told: list[tuple[str, bool]] = []
    stock_trainer(
        built, spec, RandomSamples(spec, built.config, 8), output_dir=tmp_path, collate=stack,
        listener=lambda name, begins: told.append((name, begins)), max_steps=1,
    ).train()  # fmt: skip
    names = [name for name, begins in told if begins]
    assert names == ["load", "step", "forward", "loss", "backward", "step", "forward", "loss",
                     "backward", "clip", "optimizer"]  # fmt: skip
    open_phases: list[str] = []
    for name, begins in told:
        if begins:
            open_phases.append(name)
        else:
            assert open_phases.pop() == name
    assert open_phases == []


def test_random_samples_hold_what_the_spec_says() -> None:
    spec = tiny_spec(images_per_sample=1)
    config = tiny_chameleon()
    sample = RandomSamples(spec, config, 3)[1]
    assert image_tokens(config) == 16
    assert int((sample["input_ids"] == config.image_token_id).sum()) == 16
    assert (sample["labels"][:16] == -100).all()
    assert sample["pixel_values"].shape == (1, 3, 32, 32)
    assert sample["input_ids"][16:].min() > 100
    assert image_tokens(load_config("chameleon-7b")) == 1024


def test_the_vocabulary_map_is_what_transformers_reads() -> None:
    model = model_class(tiny_chameleon())(tiny_chameleon())
    mapping = model.model.vocabulary_mapping
    assert mapping.image_tokens == list(range(4, 68))
    assert mapping.img2bpe[63] == 67
    assert chameleon_vocabulary_map(8192)["<image>"] == 8711
