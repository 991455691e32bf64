"""Models that transformers does not ship: a folder with its own python files, a class by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from planner.cli import main

CODE = """
import torch
from torch import nn
from torch.nn import functional as F
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput


class OwnConfig(PretrainedConfig):
    model_type = "vramwise_own"

    def __init__(self, vocab_size=4096, hidden_size=512, num_hidden_layers=2, heads=8, **rest):
        self.vocab_size, self.hidden_size = vocab_size, hidden_size
        self.num_hidden_layers, self.heads = num_hidden_layers, heads
        super().__init__(**rest)


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.heads, width = config.heads, config.hidden_size
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x):
        batch, length, width = x.shape
        qkv = self.qkv(self.norm(x)).view(batch, length, 3, self.heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return x + self.out(y.transpose(1, 2).reshape(batch, length, width))


class OwnDecoder(PreTrainedModel):
    config_class = OwnConfig

    def __init__(self, config):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.embed_tokens

    def get_output_embeddings(self):
        return self.lm_head

    def forward(self, input_ids, labels=None):
        x = self.embed_tokens(input_ids)
        for layer in self.layers:
            x = layer(x)
        logits = self.lm_head(x)
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return CausalLMOutput(loss=loss, logits=logits)
"""
MAP = {"AutoConfig": "own_model.OwnConfig", "AutoModelForCausalLM": "own_model.OwnDecoder"}
WIDTH, LAYERS, VOCABULARY = 512, 2, 4096
PARAMETERS = 2 * VOCABULARY * WIDTH + LAYERS * (4 * WIDTH * WIDTH + 2 * WIDTH)
SHORT = ("--sequence-length", "256", "--micro-batch-size", "2", "--lora-target-modules",
         "all-linear", "--json")  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(
        "transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules")
    )
    place = tmp_path / "model"
    place.mkdir()
    (place / "own_model.py").write_text(CODE, encoding="utf-8")
    (place / "config.json").write_text(
        json.dumps({"model_type": "vramwise_own", "auto_map": MAP}), encoding="utf-8"
    )
    return place


def _answer(capsys: Any, *arguments: str) -> dict[str, Any]:
    assert main(list(arguments)) in (0, 1)
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_a_folders_code_is_traced_when_it_is_trusted(folder: Path, capsys: Any) -> None:
    found = _answer(capsys, "probe", "--dry", str(folder), "--trust-code", *SHORT)
    assert found["total_parameters"] == PARAMETERS
    assert found["unknown_operations"] == []
    operations = {row["operation"] for row in found["live"]}
    assert "_scaled_dot_product_flash_attention" in operations
    modules = {row["module"].partition(".layers.")[2][:1] for row in found["live"]}
    assert {"0", "1"} <= modules


def test_a_folders_code_does_not_run_unasked(folder: Path, capsys: Any) -> None:
    (folder / "own_model.py").write_text("raise SystemExit('it ran')", encoding="utf-8")
    for verb in (("probe", "--dry"), ("fit", "--exact", "--gpu", "h200")):
        assert main([*verb, str(folder), *SHORT]) == 2
        told = capsys.readouterr().err
        assert told.count("\n") == 1
        assert "--trust-code" in told


def test_a_class_by_its_file(folder: Path, capsys: Any) -> None:
    named = f"{folder / 'own_model.py'}:OwnDecoder"
    (folder / "config.json").write_text(json.dumps({"num_hidden_layers": 1}), encoding="utf-8")
    found = _answer(capsys, "probe", "--dry", str(folder), "--model-class", named, *SHORT)
    assert found["total_parameters"] == PARAMETERS - 4 * WIDTH * WIDTH - 2 * WIDTH


def test_a_class_by_its_module(folder: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(folder))
    found = _answer(capsys, "probe", "--dry", str(folder), "--model-class", "own_model:OwnDecoder",
                    "--method", "full", "--quantization", "none", *SHORT)  # fmt: skip
    assert found["trainable_parameters"] == PARAMETERS


def test_fit_answers_for_it(folder: Path, capsys: Any) -> None:
    given = ("fit", str(folder), "--exact", "--trust-code", "--gpu", "h200")
    found = _answer(capsys, *given, *SHORT)
    assert found["basis"] == "traced"
    assert found["parameters"]["by_component"]["lm_head"] == VOCABULARY * WIDTH
    assert found["parameters"]["total"] == PARAMETERS


@pytest.mark.parametrize(
    ("named", "said"),
    [("nothing", "names no class"), ("no.such.module:Model", "cannot be loaded"),
     ("json:loads", "is not a PreTrainedModel")],
)  # fmt: skip
def test_a_class_that_is_none_is_one_line(folder: Path, capsys: Any, named: str, said: str) -> None:
    assert main(["probe", "--dry", str(folder), "--model-class", named, *SHORT]) == 2
    told = capsys.readouterr().err
    assert said in told
    assert told.count("\n") == 1


def test_checkpointing_that_a_class_does_not_have_is_one_line(folder: Path, capsys: Any) -> None:
    given = ("probe", "--dry", str(folder), "--trust-code", "--gradient-checkpointing")
    assert main([*given, *SHORT]) == 2
    assert "gradient_checkpointing" in capsys.readouterr().err
