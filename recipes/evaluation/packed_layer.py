"""A decoder layer of known layout over packed questions: what stands between its linears fused.

In eager mode the norms, the rotation and the gate of a 7B take two fifths of a forward, most of it
in passes over memory; here each is one kernel (recipes.evaluation.kernels) that rounds where
transformers' own operators round. The last layer asks for the questions' ends alone.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from recipes.layers import PLAIN_LAYERS, as_returned

_SILU = ("SiLU", "SiLUActivation")


class Attends(Protocol):
    """What a layer needs of the pack: the questions' last places, and the attention over it."""

    ends: Tensor

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, scaling: float, *, last: bool = False
    ) -> Tensor: ...


def is_known(layer: nn.Module) -> bool:
    """Whether the layer is: norm, attention (rotated, perhaps normed by head), add, norm, gated
    MLP, add."""
    return type(layer).__name__ in PLAIN_LAYERS


def run_layer(
    layer: Any,
    packed: Attends,
    hidden_states: Tensor,
    *,
    position_embeddings: tuple[Tensor, Tensor],
    last: bool,
    **_: Any,
) -> Any:
    """The layer's forward: hidden_states (1, T, D) -> (1, T, D), or (1, questions, D) where it is
    the last one."""
    attention, hidden = layer.self_attn, hidden_states[0]
    cos, sin = (angles[0] for angles in position_embeddings)
    x = _norm(layer.input_layernorm, hidden)
    key = _heads(attention, attention.k_proj(x))
    value = _heads(attention, attention.v_proj(x))
    key = _rotated(key, getattr(attention, "k_norm", None), cos, sin)
    if last:
        x, hidden, cos, sin = (rows[packed.ends] for rows in (x, hidden, cos, sin))
    query = _heads(attention, attention.q_proj(x))
    query = _rotated(query, getattr(attention, "q_norm", None), cos, sin)
    attended = packed.attend(query, key, value, attention.scaling, last=last)
    del x, query, key, value
    attended = attention.o_proj(attended.flatten(1))
    residual, x = _add_and_norm(layer.post_attention_layernorm, hidden, attended)
    residual += layer.mlp.down_proj(_gated(layer.mlp, x))
    return as_returned(layer, residual[None])


def _heads(attention: Any, states: Tensor) -> Tensor:
    return states.view(len(states), -1, attention.head_dim)


def _norm(norm: Any, x: Tensor) -> Tensor:
    if _in_kernels(x, norm.weight):
        from recipes.evaluation import kernels

        return kernels.rms_norm(x, norm.weight, norm.variance_epsilon)
    out: Tensor = norm(x)
    return out


def _add_and_norm(norm: Any, x: Tensor, added: Tensor) -> tuple[Tensor, Tensor]:
    """(x + added, its norm)."""
    if _in_kernels(x, added, norm.weight):
        from recipes.evaluation import kernels

        return kernels.add_rms_norm(x, added, norm.weight, norm.variance_epsilon)
    total = x + added
    return total, norm(total)


def _rotated(x: Tensor, norm: Any, cos: Tensor, sin: Tensor) -> Tensor:
    """x (T, H, D), normed over D by head where there is a norm, rotated by its position; in place
    where a kernel does it. cos and sin (T, D)."""
    half = x.shape[-1] // 2
    whole = cos.shape[-1] == x.shape[-1] and half & (half - 1) == 0
    if whole and _in_kernels(x, cos, sin, *([] if norm is None else [norm.weight])):
        from recipes.evaluation import kernels

        return kernels.rotate_(x, cos, sin, _head_norm(norm))
    if norm is not None:
        x = norm(x)
    swapped = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
    return x * cos[:, None] + swapped * sin[:, None]


def _head_norm(norm: Any) -> tuple[Tensor, Tensor | None, float] | None:
    """(weight, bias, eps): with a bias a layer norm, whose weights may differ by head."""
    if norm is None:
        return None
    if isinstance(norm, nn.LayerNorm):
        return norm.weight, norm.bias, norm.eps
    return norm.weight, None, norm.variance_epsilon


def _gated(mlp: Any, x: Tensor) -> Tensor:
    """act(gate(x)) * up(x)."""
    gate, up = mlp.gate_proj(x), mlp.up_proj(x)
    if type(mlp.act_fn).__name__ in _SILU and _in_kernels(gate, up):
        from recipes.evaluation import kernels

        return kernels.silu_mul_(gate, up)
    out: Tensor = mlp.act_fn(gate) * up
    return out


def _in_kernels(x: Tensor, *others: Tensor) -> bool:
    """On CUDA, where all are of one dtype: torch's operators would promote others."""
    alike = all(other.dtype is x.dtype for other in others)
    return x.is_cuda and x.is_contiguous() and alike and _has_triton()


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None
