"""Decoder layers of the lean step: compiled, recomputed only where gradients reach, and never
recomputing their last linear.

Backward of a checkpointed layer needs what flows *into* its last linear (the MLP's down
projection), not that linear's output, which is a fifth of the layer's arithmetic. torch's own
checkpoint recomputes it; here the layer is split into a body, recomputed with a graph, and a tail,
whose gradient is written out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from recipes.adapters import linear_backward

# Layers whose forward is: norm, attention, add, norm, MLP (gate, up, down), add. Read in
# transformers 5.17's modelling files; anything else is recomputed whole.
PLAIN_LAYERS = {
    "ChameleonDecoderLayer", "LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer",
    "Qwen3DecoderLayer",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class LayerOptions:
    """compile: generate kernels for each layer; checkpoint: recompute layers that gradients
    reach; split: leave the last linear out of the recomputation where the layout is known."""

    compile: bool
    checkpoint: bool
    split: bool = True


def decoder_layers(base: PreTrainedModel) -> list[nn.Module]:
    """The language model's decoder layers, first to last."""
    lists: list[list[nn.Module]] = [
        [layer for layer in module if isinstance(layer, GradientCheckpointingLayer)]
        for name, module in base.named_modules()
        if isinstance(module, nn.ModuleList) and name.split(".")[-1] == "layers"
    ]
    language = base.config.get_text_config().num_hidden_layers
    return next((layers for layers in lists if len(layers) == language), [])


def first_trainable_layer(layers: list[nn.Module]) -> int:
    """Index of the first layer with a trained parameter; their number where none has one."""
    for index, layer in enumerate(layers):
        if any(parameter.requires_grad for parameter in layer.parameters()):
            return index
    return len(layers)


def prepare_layers(base: PreTrainedModel, options: LayerOptions) -> None:
    """Replace the forward of each decoder layer by the lean one, in place."""
    if options.compile:
        # Every layer shares one code object; variants are by gradient mode and by shape.
        torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
        torch._dynamo.config.accumulated_recompile_limit = 1024
    compiled = _compiled if options.compile else (lambda function: function)
    whole, body = compiled(_whole), compiled(_body)
    for layer in decoder_layers(base):
        original = layer.forward
        split = options.split and type(layer).__name__ in PLAIN_LAYERS and _down_is_fused(layer)
        layer.forward = partial(_forward, layer, original, whole, body, options.checkpoint, split)


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=None)


def _forward(
    layer: Any, original: Callable[..., Any], whole: Callable[..., Any],
    body: Callable[..., Any], checkpoint: bool, split: bool, hidden_states: Tensor, **kwargs: Any,
) -> Any:  # fmt: skip
    if kwargs.get("past_key_values") is not None or not layer.training:
        return original(hidden_states, **kwargs)
    kwargs = {k: v for k, v in kwargs.items() if k not in ("past_key_values", "use_cache")}
    trained = next((p for p in layer.parameters() if p.requires_grad), None)
    reached = torch.is_grad_enabled() and (hidden_states.requires_grad or trained is not None)
    run = partial(whole, layer, **kwargs)
    if not (checkpoint and reached):
        out = run(hidden_states)
    elif split:
        out = _Split.apply(run, partial(body, layer, **kwargs), layer.mlp.down_proj,
                           hidden_states, trained)  # fmt: skip
    else:
        out = _Recomputed.apply(run, hidden_states, trained)
    return as_returned(layer, out)


def as_returned(layer: nn.Module, hidden: Tensor) -> Any:
    """A layer's hidden states in the form its model expects: Chameleon's, in a tuple."""
    return (hidden,) if type(layer).__name__.startswith("Chameleon") else hidden


def _whole(layer: nn.Module, hidden: Tensor, **kwargs: Any) -> Tensor:
    out = type(layer).forward(layer, hidden, **kwargs)
    return out[0] if isinstance(out, tuple) else out


def _body(layer: Any, hidden: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """A layer up to its last linear: (residual after attention, the down projection's input)."""
    attended, _ = layer.self_attn(hidden_states=layer.input_layernorm(hidden), **kwargs)
    residual = hidden + attended
    x = layer.post_attention_layernorm(residual)
    return residual, layer.mlp.act_fn(layer.mlp.gate_proj(x)) * layer.mlp.up_proj(x)


class _Recomputed(torch.autograd.Function):
    """A layer that saves its input alone and runs again, with a graph, in backward."""

    @staticmethod
    def forward(ctx: Any, run: Callable[[Tensor], Tensor], hidden: Tensor, anchor: Any) -> Tensor:
        ctx.run = run
        ctx.save_for_backward(hidden)
        return run(hidden)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        hidden = ctx.saved_tensors[0].detach().requires_grad_(ctx.needs_input_grad[1])
        with torch.enable_grad():
            out = ctx.run(hidden)
        torch.autograd.backward(out, grad)
        return None, hidden.grad, None


class _Split(torch.autograd.Function):
    """As above, the last linear excepted: only what flows into it is made again."""

    @staticmethod
    def forward(
        ctx: Any, run: Callable[[Tensor], Tensor], body: Callable[[Tensor], tuple[Tensor, Tensor]],
        tail: nn.Module, hidden: Tensor, anchor: Any,
    ) -> Tensor:  # fmt: skip
        ctx.body, ctx.tail = body, tail
        ctx.save_for_backward(hidden)
        return run(hidden)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        hidden = ctx.saved_tensors[0].detach().requires_grad_(ctx.needs_input_grad[3])
        with torch.enable_grad():
            residual, x = ctx.body(hidden)
        d_x = linear_backward(ctx.tail, x.detach(), grad)
        roots = [(out, g) for out, g in ((residual, grad), (x, d_x)) if out.requires_grad]
        if roots:
            torch.autograd.backward([r for r, _ in roots], [g for _, g in roots])
        return None, None, None, hidden.grad, None


def _down_is_fused(layer: Any) -> bool:
    return type(layer.mlp.down_proj).__name__.startswith("Fused") or (
        type(layer.mlp.down_proj) is nn.Linear and not layer.mlp.down_proj.weight.requires_grad
    )
