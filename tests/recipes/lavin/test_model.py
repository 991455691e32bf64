"""Adapters, router, visual tokens and modality token, against torch's own and plain loops."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from planner.errors import InputError
from planner.spec import spec_from_mapping
from recipes.lavin.adapters import GroupedLinear, adapter_parameters
from recipes.lavin.build import build_lavin
from recipes.lavin.config import Placement, lavin_config
from recipes.lavin.placement import adapters_of
from tests.recipes.lavin.tiny import mixed_batch, tiny_lavin

# Trained parameters that LaVIN's README rounds to 3.8M and 5.4M, and the 65B's by the same sum.
PUBLISHED = {"7b": 3_781_296, "13b": 5_390_080}


@pytest.mark.parametrize("size", ["7b", "13b"])
def test_trained_parameters_are_the_published_ones(size) -> None:
    built = build_lavin(spec_from_mapping({"model": f"lavin-{size}", "quantization": "none"}),
                        device="meta")  # fmt: skip
    trained = built.model.trained_parameters()
    assert sum(p.numel() for p in trained.values()) == PUBLISHED[size]
    assert {p.dtype for p in trained.values()} == {torch.float32}
    assert all("adapter" in n or n.startswith(("projector", "modality")) for n in trained)
    adapters = [adapter for _, adapter in adapters_of(built.model.language)]
    assert len(adapters) == built.config.text.num_hidden_layers
    of_one = sum(p.numel() for p in adapters[0].parameters())
    assert of_one == adapter_parameters(built.config.text.hidden_size)


def test_a_grouped_linear_is_a_convolution_with_groups() -> None:
    torch.manual_seed(0)
    ours, theirs = GroupedLinear(8, 24, 2), nn.Conv1d(8, 24, 1, groups=2)
    with torch.no_grad():
        ours.weight.copy_(theirs.weight.view(2, 12, 4))
        ours.bias.copy_(theirs.bias)
    h = torch.randn(3, 5, 8)
    torch.testing.assert_close(ours(h), theirs(h.transpose(1, 2)).transpose(1, 2))


def test_each_sample_of_a_batch_is_computed_as_alone() -> None:
    model = tiny_lavin()
    batch = mixed_batch(model)
    with torch.no_grad():
        together = model(batch["input_ids"], batch["pixel_values"]).logits
        for row in range(4):
            picture = batch["pixel_values"][row // 2 : row // 2 + 1] if row % 2 == 0 else None
            alone = model(batch["input_ids"][row : row + 1], picture).logits
            torch.testing.assert_close(together[row], alone[0], atol=2e-5, rtol=2e-5)


def test_the_published_batch_depends_on_its_first_picture() -> None:
    model = tiny_lavin(published_batch=True)
    batch = mixed_batch(model)
    with torch.no_grad():
        together = model.visual_tokens(batch["pixel_values"])
        other = batch["pixel_values"].clone()
        other[0] = 0.0
        moved = model.visual_tokens(other)
        alone = model.visual_tokens(batch["pixel_values"][2:3])
    assert not torch.allclose(together[2], moved[2], atol=1e-4)
    assert not torch.allclose(together[2], alone[0], atol=1e-4)


@pytest.mark.parametrize("across", [False, True])
def test_an_adapter_is_its_formula_in_plain_loops(across) -> None:
    model = tiny_lavin(published_batch=across, scale=0.7)
    _, adapter = next(adapters_of(model.vision))
    x = torch.randn(3, 5, 64)
    first, second = adapter.up
    with torch.no_grad():
        got = adapter(x)
        for n in range(3):
            for s in range(5):
                h = adapter.down.weight @ x[n, s] + adapter.down.bias
                routed = x[0, s] if across else x[n, 0]
                logits = adapter.router.linear.weight @ routed + adapter.router.linear.bias
                w = torch.exp(logits / 10.0) / torch.exp(logits / 10.0).sum()
                ups = [
                    torch.cat([up.weight[g] @ h[4 * g : 4 * g + 4] for g in (0, 1)]) + up.bias
                    for up in (first, second)
                ]
                wanted = x[n, s] + 0.7 * (w[0] * ups[0] + w[1] * ups[1])
                torch.testing.assert_close(got[n, s], wanted, atol=1e-5, rtol=1e-5)


def test_both_routings_give_the_same_value_and_gradients() -> None:
    found = []
    for routing in ("outputs", "bottleneck"):
        model = tiny_lavin(routing=routing)
        model(**mixed_batch(model)).loss.backward()
        found.append({n: p.grad for n, p in model.trained_parameters().items()})
    for name, gradient in found[0].items():
        torch.testing.assert_close(gradient, found[1][name], atol=1e-6, rtol=1e-4)


def test_visual_tokens_are_class_tokens_of_every_other_layer() -> None:
    model = tiny_lavin()
    pictures = mixed_batch(model)["pixel_values"]
    with torch.no_grad():
        states = model.vision(pixel_values=pictures, output_hidden_states=True).hidden_states
        wanted = model.projector(torch.stack([states[i][:, 0] for i in (2, 4, 6)], dim=1))
        torch.testing.assert_close(model.visual_tokens(pictures), wanted)
    assert lavin_config("7b").visual_tokens == 6


def test_no_position_sees_the_modality_token_but_by_the_router() -> None:
    """Without adapters in the language model its rows cannot tell one modality from the other."""
    seen = []
    for moved in (0.0, 5.0):
        model = tiny_lavin(text_adapters=None)
        batch = mixed_batch(model)
        with torch.no_grad():
            model.modality.weight += moved
            seen.append(model(batch["input_ids"], batch["pixel_values"]).logits)
    torch.testing.assert_close(seen[0][:, 1:], seen[1][:, 1:])
    assert not torch.allclose(seen[0][:, 0], seen[1][:, 0])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_modality_token_reaches_the_answer_by_the_router(attention) -> None:
    seen = []
    for moved in (0.0, 5.0):
        model = tiny_lavin()
        model.language.set_attn_implementation(attention)
        batch = mixed_batch(model)
        with torch.no_grad():
            model.modality.weight[1] -= moved
            seen.append(model(batch["input_ids"], batch["pixel_values"]).logits[:, -1])
    assert not torch.allclose(seen[0][0], seen[1][0])  # a sample with a picture
    torch.testing.assert_close(seen[0][1], seen[1][1])  # one without


def test_a_fresh_model_says_what_its_language_model_says() -> None:
    spec = spec_from_mapping({"model": "lavin-tiny", "quantization": "none",
                              "weights_dtype": "float32", "precision": "fp32"})  # fmt: skip
    model = build_lavin(spec, device="cpu").model.eval()
    ids = torch.randint(3, 500, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours = model(ids).logits[:, 1:]
        positions = torch.arange(1, 13)[None]
        theirs = model.language(input_ids=ids, position_ids=positions).logits
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


def test_placements_wrap_what_they_name() -> None:
    where = {"attention": 2, "mlp": 2, "both": 4}
    for half, count in where.items():
        placement = Placement(half, (0, 2))
        model = tiny_lavin(text_adapters=placement, vision_adapters=None)
        names = [name for name, _ in adapters_of(model)]
        assert len(names) == count
        assert all(".0." in name or ".2." in name for name in names)
    with pytest.raises(InputError, match="no such layer"):
        tiny_lavin(text_adapters=Placement("attention", (3,)))
