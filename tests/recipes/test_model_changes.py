"""New tokens, pruning and Liger on tiny models."""

from __future__ import annotations

import sys
import types

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoConfig, PreTrainedTokenizerFast

from planner.errors import MissingExtraError, UnsupportedError
from recipes.liger import apply_liger
from recipes.models import model_class
from recipes.pruning import prune_magnitude, prune_mlp_channels
from recipes.vocabulary import choose_tokens, extend, fertility, train_new_rows
from tests.recipes.tiny import tiny_chameleon, tiny_llama

ENGLISH = ["the cat sat on the mat", "a dog ran to the house", "we see the big red house"] * 5
SPANISH = ["la casa grande está cerca", "el gato duerme en la casa", "vemos la casa roja"] * 5


def _tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(vocab_size=90, special_tokens=["<unk>", "<pad>"],
                                  initial_alphabet=[*"abcdefghijklmnopqrstuvwxyzáéí"])  # fmt: skip
    tokenizer.train_from_iterator(ENGLISH, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


def test_chosen_words_save_most_pieces() -> None:
    tokenizer = _tokenizer()
    chosen = choose_tokens(tokenizer, SPANISH, 3)
    saved = {w: sum(t.split().count(w) for t in SPANISH) *
             (len(tokenizer(w, add_special_tokens=False)["input_ids"]) - 1)
             for t in SPANISH for w in t.split()}  # fmt: skip
    assert [saved[w] for w in chosen] == sorted(saved.values(), reverse=True)[:3]


def test_extension_lowers_fertility_and_starts_from_the_pieces() -> None:
    tokenizer, model = _tokenizer(), model_class(tiny_llama())(tiny_llama())
    before = {id(m): m.weight.clone() for m in (model.get_input_embeddings(), model.lm_head)}
    extension = extend(model, tokenizer, SPANISH, 5)
    assert extension.fertility_after < extension.fertility_before
    assert extension.fertility_after == fertility(tokenizer, SPANISH)
    assert len(extension.tokens) == 5
    new = tokenizer.convert_tokens_to_ids(extension.tokens[0])
    old = next(iter(before.values()))
    want = old[list(extension.replaced[0])].mean(0)
    assert torch.allclose(model.get_input_embeddings().weight[new], want, atol=1e-6)
    ids = tokenizer(SPANISH[0], return_tensors="pt")["input_ids"]
    assert torch.isfinite(model(input_ids=ids, labels=ids).loss)


def test_only_new_rows_move() -> None:
    tokenizer, model = _tokenizer(), model_class(tiny_llama())(tiny_llama())
    extension = extend(model, tokenizer, SPANISH, 5)
    model.requires_grad_(False)
    rows = train_new_rows(model, extension.first_id)
    old = [r.detach().clone() for r in rows]
    optimizer = torch.optim.AdamW(rows, lr=1e-2, weight_decay=0.0)
    ids = tokenizer(SPANISH[0], return_tensors="pt")["input_ids"]
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    for row, was in zip(rows, old, strict=True):
        assert torch.equal(row[: extension.first_id], was[: extension.first_id])
        assert not torch.equal(row[extension.first_id :], was[extension.first_id :])


@pytest.mark.parametrize("maker", [tiny_llama, tiny_chameleon])
def test_channels_taken_out_save_their_bytes(maker, tmp_path) -> None:
    model = model_class(maker())(maker())
    told = prune_mlp_channels(model, 0.5)
    assert told.bytes_before - told.bytes_after == 2 * 3 * 64 * 64 * 4
    ids = torch.randint(101, 290, (1, 12))
    wanted = model.eval()(input_ids=ids).logits
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    assert AutoConfig.from_pretrained(tmp_path).get_text_config().intermediate_size == 64
    assert torch.allclose(loaded(input_ids=ids).logits, wanted, atol=1e-5)


def test_channels_that_do_nothing_are_the_ones_taken() -> None:
    model = model_class(tiny_llama())(tiny_llama()).eval()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.gate_proj.weight[::2] = 0
    ids = torch.randint(0, 290, (1, 12))
    wanted = model(input_ids=ids).logits
    prune_mlp_channels(model, 0.5)
    assert torch.allclose(model(input_ids=ids).logits, wanted, atol=1e-5)


def test_zeroed_weights_save_nothing() -> None:
    model = model_class(tiny_llama())(tiny_llama())
    linear = model.model.layers[0].mlp.up_proj
    largest = linear.weight.abs().max().item()
    told = prune_magnitude(model, 0.5)
    assert told.bytes_after == told.bytes_before
    assert (linear.weight == 0).float().mean().item() == pytest.approx(0.5, abs=0.01)
    assert linear.weight.abs().max().item() == largest


def test_liger_is_refused_by_name_where_it_has_no_patch(monkeypatch) -> None:
    model = model_class(tiny_chameleon())(tiny_chameleon())
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    with pytest.raises(MissingExtraError, match="liger-kernel"):
        apply_liger(model)
    called = {}
    patch = types.ModuleType("liger_kernel.transformers.monkey_patch")
    patch.MODEL_TYPE_TO_APPLY_LIGER_FN = {"llama": lambda **kwargs: called.update(kwargs)}
    for name in ("liger_kernel", "liger_kernel.transformers"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, patch.__name__, patch)
    with pytest.raises(UnsupportedError, match="no patch for chameleon"):
        apply_liger(model)
    apply_liger(model_class(tiny_llama())(tiny_llama()))
    assert called["fused_linear_cross_entropy"] is False
