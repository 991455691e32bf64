"""Put the fused operator under a peft model's linears, in place.

peft still owns the adapters: their names, parameters, saving and loading stay its own, and what
the operator does not cover (merged or switched-off adapters, 8-bit bases) takes peft's path.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from bitsandbytes.nn.modules import Linear4bit
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from recipes.dropout import up_projection
from recipes.fused import adapted_linear, adapted_linear_backward


class Seeds:
    """One int32 seed a module, and one for the head, on the device: all set by one launch for each
    micro batch."""

    def __init__(self, count: int, device: torch.device) -> None:
        ordinals = torch.arange(count + 1, dtype=torch.int64)
        # Far-apart streams for the modules of one step: an odd 31-bit multiplier.
        self._offsets = ((ordinals * 1_640_531_527) % (1 << 31)).to(torch.int32).to(device)
        self.values = torch.zeros(count + 1, dtype=torch.int32, device=device)
        self.head = self.values[count]

    def set(self, seed: int, step: int, micro_batch: int) -> None:
        """Seeds of one micro batch, a function of the run's seed and its place alone."""
        mixed = (seed * 0x85EBCA6B + step * 0xC2B2AE35 + micro_batch * 0x27D4EB2F) & 0xFFFFFFFF
        mixed = (mixed ^ (mixed >> 15)) * 0x2C1B3C6D & 0xFFFFFFFF
        torch.add(self._offsets, mixed - (1 << 31), out=self.values)


def fuse(model: nn.Module, device: torch.device) -> Seeds:
    """Fuse every adapter and frozen 4-bit linear the operator covers; returns their seeds."""
    modules: list[Any] = [module for module in model.modules() if _covered(module)]
    inner = {id(m.base_layer) for m in modules if isinstance(m, LoraLayer)}
    modules = [module for module in modules if id(module) not in inner]
    seeds = Seeds(len(modules), device)
    for ordinal, module in enumerate(modules):
        base: Any = module.get_base_layer() if isinstance(module, LoraLayer) else module
        module._frozen = _frozen(base)
        module._seed = seeds.values[ordinal]
        mixin = _FusedLora if isinstance(module, LoraLayer) else _FusedFrozen
        original: Any = type(module)
        module.__class__ = _fused_class(mixin, original)
    return seeds


@cache
def _fused_class(mixin: type, original: type) -> type:
    return type(f"Fused{original.__name__}", (mixin, original), {})


def _covered(module: nn.Module) -> bool:
    if not isinstance(module, LoraLayer):
        return type(module) is Linear4bit
    base = module.get_base_layer()
    plain = not module.lora_variant and not any(module.lora_bias.values())
    frozen = not any(parameter.requires_grad for parameter in base.parameters())
    return plain and frozen and type(base) in (nn.Linear, Linear4bit) and len(module.lora_A) == 1


def _frozen(base: nn.Linear) -> dict[str, Any]:
    """The frozen weight's tensors, as plain ones: sharing storage, not subclasses."""
    weight = base.weight.detach().as_subclass(Tensor)
    shape = [base.out_features, base.in_features]
    state = getattr(base.weight, "quant_state", None)
    if state is None:
        return {"weight": weight, "quant": [], "quant_type": "", "shape": shape}
    quant = [state.absmax]
    if state.nested:
        quant += [state.state2.code, state.state2.absmax, state.offset]
    return {"weight": weight, "quant": quant, "quant_type": state.quant_type, "shape": shape}


class _FusedLora:
    """forward of a peft LoRA layer through the fused operator."""

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.disable_adapters or self.merged or args or kwargs:
            return super().forward(x, *args, **kwargs)  # type: ignore[misc]
        name = self.active_adapters[0]
        base = self.base_layer
        return adapted_linear(
            x, **self._frozen, bias=base.bias,
            a=self.lora_A[name].weight, b=self.lora_B[name].weight, seed=self._seed,
            scaling=self.scaling[name],
            dropout=float(getattr(self.lora_dropout[name], "p", 0.0)) if self.training else 0.0,
        )[0]  # fmt: skip


class _FusedFrozen:
    """forward of a frozen 4-bit linear through the fused operator."""

    def forward(self: Any, x: Tensor) -> Tensor:
        return adapted_linear(
            x, **self._frozen, bias=self.bias, a=None, b=None, seed=None, scaling=1.0, dropout=0.0
        )[0]


@torch.no_grad()
def linear_backward(linear: nn.Module, x: Tensor, grad: Tensor) -> Tensor:
    """Gradient at the input x of a fused or plain frozen linear, given the gradient at its
    output; the adapter's gradients are added to its parameters. Nothing of the forward is kept."""
    module: Any = linear
    if type(linear) is nn.Linear:
        return grad @ linear.weight
    frozen = module._frozen
    if not isinstance(linear, LoraLayer):
        return adapted_linear_backward(
            grad, None, grad.new_empty(0), **frozen, a=None, b=None, seed=None, scaling=1.0,
            dropout=0.0, needs_input=True,
        )[0]  # fmt: skip
    name = module.active_adapters[0]
    a, b = module.lora_A[name].weight, module.lora_B[name].weight
    p = float(getattr(module.lora_dropout[name], "p", 0.0)) if module.training else 0.0
    rows = x.reshape(-1, x.shape[-1])
    seed: Tensor = module._seed
    u = up_projection(rows, a.to(x.dtype), seed, p)
    dx, da, db = adapted_linear_backward(
        grad, x, u, **frozen, a=a, b=b, seed=seed, scaling=module.scaling[name], dropout=p,
        needs_input=True,
    )  # fmt: skip
    for parameter, gradient in ((a, da), (b, db)):
        parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)
    return dx
