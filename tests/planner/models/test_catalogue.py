"""The catalogue against torch and peft: every entry, at full depth, on the meta device."""

from __future__ import annotations

import copy
import re
from typing import Any

import peft
import pytest

from planner.models.lora import lora_parameters, target_modules
from planner.models.registry import Model, catalogue, catalogue_ids, load_model
from planner.spec import Lora
from tests.planner.models.conftest import meta_model

IDS = catalogue_ids()
COMPONENTS = (
    ("adapter", r".*\.adapter\.|modality\."),
    ("image_tokenizer", r"model\.vqmodel\."),
    ("projector",
     r"(model\.multi_modal_)?projector\.|model\.visual\.merger\.|model\.image_newline"),
    ("vision_tower", r"(model\.(vision_tower|visual)|vision)\."),
    ("embeddings", r"(language\.)?model\.(language_model\.)?embed_tokens\."),
    ("lm_head", r"(language\.)?lm_head\."),
    ("language_model", r"(language\.)?model\.(language_model\.)?(layers|norm)\."),
)  # fmt: skip
TARGETS = (("lm_head", "down_proj"), ("embed_tokens", "o_proj"))


def parameters_of(module: Any) -> tuple[tuple[str, tuple[int, ...]], ...]:
    return tuple((k, tuple(p.shape)) for k, p in module._parameters.items() if p is not None)


def component_of(name: str) -> str:
    return next(component for component, pattern in COMPONENTS if re.match(pattern, name))


def with_peft(model: Any, targets: tuple[str, ...] | str) -> Any:
    chosen = targets if isinstance(targets, str) else list(targets)
    config = peft.LoraConfig(r=8, target_modules=chosen)
    return peft.get_peft_model(copy.deepcopy(model), config)


def entries() -> list[Any]:
    large = {model.id for model in catalogue() if model.tree.total_parameters > 20e9}
    return [pytest.param(name, marks=[pytest.mark.slow] * (name in large)) for name in IDS]


@pytest.fixture(params=entries(), scope="module")
def entry(request: pytest.FixtureRequest) -> Model:
    return load_model(request.param)


def test_catalogue_has_the_models_that_were_promised() -> None:
    assert len(IDS) >= 40
    assert {model.model_type for model in catalogue()} >= {
        "chameleon", "llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "gemma3_text",
        "phi3", "llava", "llava_next", "qwen2_vl", "qwen2_5_vl", "paligemma", "lavin",
    }  # fmt: skip


def test_modules_are_those_of_torch_in_its_order(entry: Model) -> None:
    model = meta_model(entry)
    expected = [
        (name, owned) for name, module in model.named_modules() if (owned := parameters_of(module))
    ]
    assert [(module.path, module.shapes) for module in entry.tree.modules] == expected


def test_parameters_are_those_of_torch_in_total_and_by_component(entry: Model) -> None:
    counts: dict[str, int] = {}
    for name, parameter in meta_model(entry).named_parameters():
        component = component_of(name)
        counts[component] = counts.get(component, 0) + parameter.numel()
    ours = {component: count for component, count in entry.tree.by_component().items() if count}
    assert ours == counts
    assert entry.tree.total_parameters == sum(counts.values())


@pytest.mark.parametrize("targets", TARGETS, ids=str)
def test_lora_trains_what_peft_trains(entry: Model, targets: tuple[str, ...]) -> None:
    _takes_lora(entry)
    expected = with_peft(meta_model(entry), targets).get_nb_trainable_parameters()[0]
    assert lora_parameters(entry.tree, Lora(rank=8, target_modules=targets)) == expected


def _takes_lora(entry: Model) -> None:
    if entry.model_type == "lavin":
        pytest.skip("trains its own adapters")


def test_all_linear_is_what_peft_calls_all_linear(entry: Model) -> None:
    _takes_lora(entry)
    adapted = with_peft(meta_model(entry), "all-linear")
    expected = [
        name.removeprefix("base_model.model.")
        for name, module in adapted.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    ]
    assert [module.path for module in target_modules(entry.tree, "all-linear")] == expected
    lora = Lora(rank=8, target_modules="all-linear")
    assert lora_parameters(entry.tree, lora) == adapted.get_nb_trainable_parameters()[0]


def test_entries_say_where_they_were_read(entry: Model) -> None:
    assert entry.source.startswith("https://")
    assert entry.verified or len(entry.note) > 40
