"""Names, folders, the Hub cache and what is wrong with a config: each told in one clear line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from planner.errors import InputError, UnsupportedError
from planner.models.families import FAMILIES, Family, family_of
from planner.models.registry import load_model, model_from_config

LLAMA: dict[str, Any] = {
    "model_type": "llama", "vocab_size": 320, "hidden_size": 64, "intermediate_size": 128,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip


@pytest.fixture(autouse=True)
def _no_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load_model.cache_clear()
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))


def write(path: Path, config: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(config), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("facebook/chameleon-7b", "facebook/chameleon-7b"),
        ("FACEBOOK/Chameleon-7B", "facebook/chameleon-7b"),
        ("chameleon-7b", "facebook/chameleon-7b"),
        ("llava-1.5-7b", "llava-hf/llava-1.5-7b-hf"),
        ("qwen2.5-7b", "Qwen/Qwen2.5-7B"),
        ("llama-2-7b", "meta-llama/Llama-2-7b-hf"),
        ("Qwen/Qwen2.5-7B-Instruct", "Qwen/Qwen2.5-7B"),
    ],
)
def test_names_in_any_case_and_short_names_are_found(name: str, found: str) -> None:
    assert load_model(name).id == found


def test_a_folder_and_a_file_are_read(tmp_path: Path) -> None:
    path = write(tmp_path / "mine" / "config.json", LLAMA)
    by_folder, by_file = load_model(str(path.parent)), load_model(str(path))
    assert by_folder.tree == by_file.tree
    assert by_folder.source == str(path)


def test_the_hub_cache_is_read_at_its_main_revision(tmp_path: Path) -> None:
    folder = tmp_path / "hub" / "models--Me--Tiny"
    write(folder / "snapshots" / "aaa" / "config.json", {**LLAMA, "num_hidden_layers": 1})
    write(folder / "snapshots" / "bbb" / "config.json", LLAMA)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("aaa")
    assert load_model("me/tiny").geometry.num_hidden_layers == 1


def test_an_unknown_name_is_told_with_the_nearest() -> None:
    with pytest.raises(InputError, match="did you mean 'facebook/chameleon-7b'"):
        load_model("facebok/chameleon-7b")


def test_an_unknown_family_is_refused_by_name(tmp_path: Path) -> None:
    path = write(tmp_path / "config.json", {**LLAMA, "model_type": "mamba"})
    with pytest.raises(UnsupportedError, match=r"'mamba'.*chameleon, llama.*probe --dry"):
        load_model(str(path))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is empty"),
        ("  \n", "is empty"),
        ("{", "is not JSON"),
        ("[1]", "config: is not a JSON object"),
        ('"llama"', "config: is not a JSON object"),
        ("{}", r"config\.model_type: is missing"),
        ('{"model_type": 3}', r"config\.model_type: is not a string \(got 3\)"),
        ('{"model_type": "llama"}', r"config\.hidden_size: is missing"),
    ],
)
def test_a_broken_file_is_told_in_a_line(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=said):
        load_model(str(path))


def test_a_folder_without_a_config_is_told(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"without a config\.json"):
        load_model(str(tmp_path))


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"hidden_size": 0}, "config.hidden_size"),
        ({"hidden_size": -4096}, "config.hidden_size"),
        ({"hidden_size": "4096"}, "config.hidden_size"),
        ({"hidden_size": 4096.5}, "config.hidden_size"),
        ({"hidden_size": True}, "config.hidden_size"),
        ({"hidden_size": 10**30}, "config.hidden_size"),
        ({"num_hidden_layers": 10**6}, "config.num_hidden_layers"),
        ({"num_attention_heads": 6}, "config.num_attention_heads"),
        ({"num_key_value_heads": 3}, "config.num_key_value_heads"),
        ({"rms_norm_eps": "small"}, "config.rms_norm_eps"),
        ({"tie_word_embeddings": "yes"}, "config.tie_word_embeddings"),
        ({"hidden_act": 7}, "config.hidden_act"),
        ({"vocab_size": None}, "config.vocab_size"),
        ({"rope_parameters": []}, "config.rope_parameters"),
    ],
)
def test_an_absurd_key_is_named(change: dict[str, object], field: str) -> None:
    with pytest.raises(InputError) as caught:
        model_from_config({**LLAMA, **change}, "mine")
    assert [problem.field for problem in caught.value.problems] == [field]


def test_all_problems_are_told_at_once() -> None:
    config = {"model_type": "llava", "text_config": {"hidden_size": -1, "model_type": "gpt2"},
              "vision_config": {"image_size": "big"}}  # fmt: skip
    with pytest.raises(InputError) as caught:
        model_from_config(config, "mine")
    assert {problem.field for problem in caught.value.problems} == {
        "config.text_config.hidden_size",
        "config.text_config.model_type",
        "config.vision_config.image_size",
    }


def problems_of(family: Family, config: dict[str, object]) -> list[str]:
    """The fields that are refused, or none where the modules can be listed."""
    try:
        list(family.modules(family.geometry(config)))
    except InputError as error:
        return [problem.field for problem in error.problems]
    return []


@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_family_survives_every_key_turned_to_nonsense(model_type: str) -> None:
    name = {
        "gemma3_text": "gemma-3-1b", "gemma3": "gemma-3-4b", "llava_next": "llava-1.6-mistral-7b",
        "qwen2_vl": "qwen2-vl-2b", "qwen2_5_vl": "qwen2.5-vl-3b", "paligemma": "paligemma-3b",
        "chameleon": "chameleon-7b", "llama": "llama-7b", "mistral": "mistral-7b",
        "qwen2": "qwen2-0.5b", "qwen3": "qwen3-0.6b", "gemma": "gemma-2b", "gemma2": "gemma-2-2b",
        "phi3": "phi-3-mini", "llava": "llava-1.5-7b", "lavin": "lavin-7b",
    }[model_type]  # fmt: skip
    config = dict(load_model(name).config)
    family = family_of(model_type)
    for key in config:
        for nonsense in ("x", -1, [], {}, [[]], 10**40, float("nan")):
            told = problems_of(family, {**config, key: nonsense})
            assert not told or told[0].startswith(f"config.{key}")


def test_loading_one_model_reads_one_file_and_no_torch() -> None:
    code = (
        "import sys\n"
        "from planner.models.registry import load_model\n"
        "opened = []\n"
        "sys.addaudithook(lambda e, a: opened.append(str(a[0])) if e == 'open' else None)\n"
        "load_model('chameleon-7b').tree\n"
        "print(sum('--' in name and name.endswith('.json') for name in opened))\n"
        "print([name for name in ('torch', 'transformers', 'pandas') if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:2] == ["1", "[]"]
