"""What an adapter lands on: the seeds' logged counts, peft itself, and refusals."""

from __future__ import annotations

import copy

import peft
import pytest

from planner.errors import InputError
from planner.models.lora import lora_modules, lora_parameters, target_modules
from planner.models.registry import load_model
from planner.spec import Lora
from tests.planner.models.conftest import meta_model

SEVEN = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.mark.parametrize(
    ("targets", "trainable"),
    [
        (("lm_head",), 557_056),
        (("q_proj", "v_proj"), 4_194_304),
        (("q_proj", "k_proj", "v_proj", "o_proj"), 8_388_608),
        (SEVEN, 19_988_480),
    ],
)
def test_chameleon_7b_trains_what_was_logged(targets: tuple[str, ...], trainable: int) -> None:
    tree = load_model("chameleon-7b").tree
    assert lora_parameters(tree, Lora(rank=8, target_modules=targets)) == trainable


def test_chameleon_7b_counts_are_those_the_original_authors_logged() -> None:
    # Their notebook printed 3,805,644,800 after 4 bits (two weights a byte) and LoRA on lm_head.
    tree = load_model("facebook/chameleon-7b").tree
    assert tree.total_parameters == 7_043_090_432
    packed = sum(module.parameters for module in tree.linears() if module.path != "lm_head")
    adapter = lora_parameters(tree, Lora(rank=8, target_modules=("lm_head",)))
    assert tree.total_parameters - packed // 2 + adapter == 3_805_644_800


@pytest.mark.parametrize(
    ("name", "targets"),
    [
        ("facebook/chameleon-7b", ("conv1", "nin_shortcut", "q_proj")),
        ("facebook/chameleon-7b", ("model.layers.3.mlp.up_proj", "quantize.embedding")),
        ("qwen2.5-vl-3b", ("patch_embed.proj", "qkv", "mlp.0")),
        ("paligemma-3b", ("position_embedding", "fc1", "patch_embedding")),
        ("phi-3-mini", ("qkv_proj", "gate_up_proj")),
    ],
)
def test_odd_targets_train_what_peft_trains(name: str, targets: tuple[str, ...]) -> None:
    model = load_model(name)
    config = peft.LoraConfig(r=6, target_modules=list(targets))
    adapted = peft.get_peft_model(copy.deepcopy(meta_model(model)), config)
    expected = {
        name.removeprefix("base_model.model."): sum(
            parameter.numel() for key, parameter in module.named_parameters() if "lora_" in key
        )
        for name, module in adapted.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    }
    ours = lora_modules(model.tree, Lora(rank=6, target_modules=targets))
    assert {adapted.module.path: adapted.parameters for adapted in ours} == expected


def test_every_target_that_matches_nothing_is_told_with_the_nearest() -> None:
    with pytest.raises(InputError) as caught:
        target_modules(load_model("chameleon-7b").tree, ("q_prj", "down_proj", "query"))
    first, second = str(caught.value).splitlines()
    assert "'q_prj'" in first
    assert "did you mean 'q_proj'?" in first
    assert "'query'" in second


def test_a_norm_is_refused_as_peft_refuses_it() -> None:
    model = load_model("llama-3.2-1b")
    with pytest.raises(ValueError, match="not supported"):
        peft.get_peft_model(
            copy.deepcopy(meta_model(model)), peft.LoraConfig(target_modules=["input_layernorm"])
        )
    with pytest.raises(InputError, match=r"layers\.0\.input_layernorm"):
        target_modules(model.tree, ("input_layernorm",))


def test_a_group_of_modules_is_refused_with_what_it_is() -> None:
    with pytest.raises(InputError, match="group of modules"):
        target_modules(load_model("chameleon-7b").tree, ("self_attn",))
