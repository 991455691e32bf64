"""The fused operator against peft's own layer, and the dropout hash against its statistics."""

from __future__ import annotations

import copy

import pytest
import torch

from recipes.adapters import fuse
from recipes.build import build
from recipes.dropout import (
    add_branch,
    down_gradient,
    dropped,
    keep_mask,
    up_projection,
)
from tests.recipes.tiny import tiny_llama, tiny_spec


def _pair(quantization: str, targets, dropout: float = 0.0):
    spec = tiny_spec(
        stack="lean", quantization=quantization,
        lora={"rank": 4, "alpha": 8.0, "dropout": dropout, "target_modules": targets},
    )  # fmt: skip
    config = tiny_llama(attention_bias=True)
    built = build(spec, config=config, device="cpu")
    with torch.no_grad():  # B starts at zero: give the adapters something to say
        for name, p in built.model.named_parameters():
            if "lora_B" in name:
                p.normal_(0, 0.05)
    return built.model, copy.deepcopy(built.model)


@pytest.mark.parametrize("quantization", ["none", "nf4", "fp4"])
@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "down_proj"]])
def test_fused_model_equals_peft_in_loss_and_gradients(quantization: str, targets) -> None:
    peft, fused = _pair(quantization, targets)
    fuse(fused, torch.device("cpu"))
    ids = torch.randint(0, 300, (2, 24), generator=torch.Generator().manual_seed(0))
    losses = [m.train()(input_ids=ids, labels=ids).loss for m in (peft, fused)]
    for loss in losses:
        loss.backward()
    assert torch.allclose(losses[0], losses[1], rtol=1e-6)
    grads = [
        {n: p.grad for n, p in m.named_parameters() if p.grad is not None} for m in (peft, fused)
    ]
    assert grads[0].keys() == grads[1].keys()
    assert len(grads[0]) == 2 * 2 * (7 if targets == "all-linear" else 2)
    for name, grad in grads[0].items():
        assert torch.allclose(grad, grads[1][name], rtol=1e-4, atol=1e-6), name


def test_fused_model_saves_less() -> None:
    saved = []
    for index, model in enumerate(_pair("nf4", "all-linear", dropout=0.05)):
        if index:
            fuse(model, torch.device("cpu"))
        seen: dict[int, int] = {}

        def pack(tensor, seen=seen):
            storage = tensor.untyped_storage()
            seen[storage.data_ptr()] = storage.nbytes()
            return tensor

        ids = torch.randint(0, 300, (2, 24))
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            model.train()(input_ids=ids, labels=ids)
        saved.append(sum(seen.values()))
    assert saved[1] < 0.8 * saved[0]


def test_fused_model_covers_every_adapter_and_keeps_peft_names() -> None:
    peft, fused = _pair("nf4", "all-linear")
    names = list(peft.state_dict())
    fuse(fused, torch.device("cpu"))
    assert list(fused.state_dict()) == names
    assert sum(type(m).__name__.startswith("Fused") for m in fused.modules()) == 2 * 7


def test_dropout_gradient_is_the_mask_of_its_forward() -> None:
    _, model = _pair("none", "all-linear", dropout=0.3)
    seeds = fuse(model, torch.device("cpu"))
    seeds.set(1, 2, 3)
    layer = model.base_model.model.model.layers[0].mlp.gate_proj
    x = torch.randn(5, 64, dtype=torch.float64).float().requires_grad_()
    y = layer.train()(x)
    y.sum().backward()
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    mask = keep_mask(x.shape, layer._seed, 0.3) / 0.7
    want_a = layer.scaling["default"] * torch.outer(b.sum(0), (x * mask).sum(0))
    assert torch.allclose(a.grad, want_a, rtol=1e-4, atol=1e-6)
    want_x = layer.base_layer.weight.sum(0) + layer.scaling["default"] * mask * (b.sum(0) @ a)
    assert torch.allclose(x.grad, want_x.expand_as(x), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("p", [0.05, 0.5])
def test_keep_mask_statistics(p: float) -> None:
    seeds = torch.tensor([12345, -99], dtype=torch.int32)
    masks = [keep_mask(torch.Size([1000, 400]), seed, p).float() for seed in seeds]
    deviation = (p * (1 - p) / 400_000) ** 0.5
    for mask in masks:
        assert abs(mask.mean().item() - (1 - p)) < 4 * deviation
        assert abs(mask[:, 0].mean().item() - (1 - p)) < 5 * deviation * 20
        neighbours = torch.corrcoef(torch.stack([mask.flatten()[:-1], mask.flatten()[1:]]))[0, 1]
        assert abs(neighbours) < 5 / 400_000**0.5
    between = torch.corrcoef(torch.stack([m.flatten() for m in masks]))[0, 1]
    assert abs(between) < 5 / 400_000**0.5


def test_branch_functions_are_the_masked_products() -> None:
    seed = torch.tensor(7, dtype=torch.int32)
    x, a, du, dx = torch.randn(6, 8), torch.randn(2, 8), torch.randn(6, 2), torch.randn(6, 8)
    masked = keep_mask(x.shape, seed, 0.25) / 0.75
    assert torch.allclose(dropped(x, seed, 0.25), x * masked)
    assert torch.allclose(up_projection(x, a, seed, 0.25), (x * masked) @ a.t(), atol=1e-6)
    assert torch.allclose(down_gradient(du, x, seed, 0.25), du.t() @ (x * masked), atol=1e-6)
    want = dx + (du @ a) * masked
    assert torch.allclose(add_branch(dx, du, a, seed, 0.25), want, atol=1e-6)
    assert torch.equal(up_projection(x, a, None, 0.25), x @ a.t())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("rows", "width", "rank"), [(512, 256, 16), (130, 200, 8), (65, 4096, 64)])
def test_kernels_equal_torch(rows: int, width: int, rank: int) -> None:
    from recipes import kernels

    torch.manual_seed(0)
    seed = torch.tensor(-12345, dtype=torch.int32, device="cuda")
    x, a = torch.randn(rows, width, device="cuda"), torch.randn(rank, width, device="cuda")
    du, dx = torch.randn(rows, rank, device="cuda"), torch.randn(rows, width, device="cuda")
    masked = keep_mask(x.shape, seed, 0.05) / 0.95
    close = {"rtol": 1e-3, "atol": 1e-3}
    assert torch.allclose(kernels.up(x, a, seed, 0.05), (x * masked) @ a.t(), **close)
    want = dx + (du @ a) * masked
    assert torch.allclose(kernels.add_branch(dx, du, a, seed, 0.05), want, **close)
    got = kernels.down_gradient(du, x, seed, 0.05)
    assert torch.allclose(got, du.t() @ (x * masked), **close)


def test_same_mask_compiled() -> None:
    seed = torch.tensor(7, dtype=torch.int32)
    compiled = torch.compile(keep_mask, backend="aot_eager")
    shape = torch.Size([33, 65])
    assert torch.equal(compiled(shape, seed, 0.1), keep_mask(shape, seed, 0.1))


def test_seeds_differ_by_module_step_and_micro_batch() -> None:
    _, model = _pair("none", "all-linear")
    seeds = fuse(model, torch.device("cpu"))
    seen = []
    for step, micro in ((0, 0), (0, 1), (1, 0)):
        seeds.set(42, step, micro)
        seen += seeds.values.tolist()
    assert len(set(seen)) == 3 * (14 + 1)
