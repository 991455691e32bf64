"""The chunked loss against the stock model's own loss and gradients."""

from __future__ import annotations

import pytest
import torch
from transformers import Gemma2Config

from planner.errors import UnsupportedError
from recipes.build import build
from recipes.loss import head_of, linear_cross_entropy, predicted_rows
from tests.recipes.tiny import tiny_chameleon, tiny_llama, tiny_spec


def _gemma():
    return Gemma2Config(
        vocab_size=300, hidden_size=64, intermediate_size=96, num_hidden_layers=1, head_dim=16,
        num_attention_heads=4, num_key_value_heads=2, final_logit_softcapping=2.0,
    )  # fmt: skip


CONFIGS = {"chameleon": tiny_chameleon, "llama": tiny_llama, "gemma": _gemma}


def _batch(config) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(101, config.vocab_size, (2, 24), generator=generator)
    labels = ids.clone()
    labels[0, :9] = -100
    labels[1, -3:] = -100
    return ids, labels


def _losses(built, ids, labels, chunk_bytes):
    """(stock loss, chunked loss) with their gradients, by name."""
    base, results = built.base, []
    stock = lambda: built.model(input_ids=ids, labels=labels).loss  # noqa: E731

    def chunked():
        hidden = base.model(input_ids=ids, use_cache=False).last_hidden_state
        positions, targets = predicted_rows(labels)
        return linear_cross_entropy(hidden, positions, targets, head_of(base), len(targets),
                                    chunk_bytes=chunk_bytes)  # fmt: skip

    for function in (stock, chunked):
        built.model.zero_grad(set_to_none=True)
        loss = function()
        (3 * loss).backward()
        grads = {n: p.grad for n, p in built.model.named_parameters() if p.grad is not None}
        results.append((loss.detach(), grads))
    return results


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("targets", ["all-linear", ["lm_head"], ["q_proj", "lm_head"], None])
@pytest.mark.parametrize("chunk_rows", [1, 7, 1000])
def test_equals_stock_loss_and_gradients(family: str, targets, chunk_rows: int) -> None:
    config = CONFIGS[family]()
    values = {"method": "full"} if targets is None else {"lora": {
        "rank": 4, "dropout": 0.0, "target_modules": targets}}  # fmt: skip
    built = build(tiny_spec(**values), config=config, device="cpu")
    with torch.no_grad():
        for name, p in built.model.named_parameters():
            if "lora_B" in name:
                p.normal_(0, 0.05)
    ids, labels = _batch(config)
    chunk_bytes = chunk_rows * config.vocab_size * 4
    (loss, grads), (chunked, found) = _losses(built, ids, labels, chunk_bytes)
    assert torch.allclose(chunked, loss, rtol=1e-6)
    assert found.keys() == grads.keys()
    for name, grad in grads.items():
        assert (found[name] - grad).abs().max() < 1e-5 * grad.abs().max(), name


def test_bf16_gradients_match_stock_within_rounding() -> None:
    config = tiny_chameleon()
    built = build(tiny_spec(method="full", weights_dtype="bfloat16"), config=config, device="cpu")
    ids, labels = _batch(config)
    (loss, grads), (chunked, found) = _losses(built, ids, labels, 4 * 512 * 2)
    assert torch.allclose(chunked, loss.float(), rtol=4e-3)
    for name, grad in grads.items():
        scale = grad.float().abs().max()
        assert (found[name].float() - grad.float()).abs().max() < 0.03 * scale, name


def test_masked_columns_get_no_probability_and_no_gradient() -> None:
    built = build(tiny_spec(method="full"), config=tiny_chameleon(), device="cpu")
    ids, labels = _batch(built.config)
    head = head_of(built.base)
    assert head.excluded.sum() == 64
    hidden = built.base.model(input_ids=ids).last_hidden_state
    positions, targets = predicted_rows(labels)
    loss = linear_cross_entropy(hidden, positions, targets, head, len(targets))
    loss.backward()
    assert built.base.lm_head.weight.grad[head.excluded].abs().max() == 0


def test_a_masked_label_costs_what_it_costs_in_stock() -> None:
    built = build(tiny_spec(), config=tiny_chameleon(), device="cpu")
    ids, labels = _batch(built.config)
    labels[0, 12] = 5  # an image code
    stock = built.model(input_ids=ids, labels=labels).loss
    hidden = built.base.model(input_ids=ids).last_hidden_state
    positions, targets = predicted_rows(labels)
    ours = linear_cross_entropy(hidden, positions, targets, head_of(built.base), len(targets))
    assert stock > 1e36
    assert torch.allclose(ours, stock, rtol=1e-5)


def test_predicted_rows_are_the_shifted_labels() -> None:
    labels = torch.tensor([[-100, 5, 6, -100], [7, 8, -100, 9]])
    positions, targets = predicted_rows(labels)
    assert positions.tolist() == [0, 1, 4, 6]
    assert targets.tolist() == [5, 6, 8, 9]


def test_no_logits_larger_than_a_chunk_are_held(monkeypatch) -> None:
    built = build(tiny_spec(), config=tiny_llama(), device="cpu")
    head = head_of(built.base)
    hidden = torch.randn(64, 64, requires_grad=True)
    seen = []
    original = torch.Tensor.__matmul__

    def watched(left, right):
        seen.append((left.shape[0], right.shape[-1]))
        return original(left, right)

    monkeypatch.setattr(torch.Tensor, "__matmul__", watched)
    positions = torch.arange(64)
    linear_cross_entropy(hidden, positions, positions % 300, head, 64, chunk_bytes=4 * 300 * 8)
    assert max(rows for rows, columns in seen if columns == 300) == 8


def test_scaled_logits_are_refused() -> None:
    built = build(tiny_spec(), config=tiny_llama(), device="cpu")
    built.base.config.logit_scale = 0.5
    with pytest.raises(UnsupportedError, match="logit_scale"):
        head_of(built.base)
