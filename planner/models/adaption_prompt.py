"""LLaMA-Adapter as peft builds it (AdaptionPromptConfig): learned prompt tokens that the upper
layers' attention sees through a gate which starts at zero.

Source: peft 0.21 (tuners/adaption_prompt/layer.py AdaptedAttention, utils.py
llama_compute_query_states). Shapes: B batch, S sequence, D hidden, h heads, k key-value heads,
d head dimension, L prompt tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

from planner.errors import InputError, Problem, UnsupportedError
from planner.memory import layers as nn
from planner.memory.eager_attention import matmul, softmax
from planner.memory.loaded import Loaded
from planner.memory.ops import Engine
from planner.memory.outliers import outlier_model
from planner.memory.tensor import Tensor
from planner.memory.work import grad_bytes
from planner.models.decoder import DecoderGeometry
from planner.models.registry import Model
from planner.models.tree import ModelTree, Module
from planner.spec import AdaptionPrompt, RunSpec

# Model types of peft's TRANSFORMERS_MODEL_CONFIG that have a family here.
FAMILIES = ("llama", "mistral")
PROMPT, GATE = "adaption_prompt", "adaption_gate"


def load(spec: RunSpec, model: Model) -> Loaded:
    """The model with prompts in its upper layers. Raises for what peft refuses."""
    if model.model_type not in FAMILIES:
        raise UnsupportedError(
            f"adapter: peft has no adaption prompt for {model.model_type}; allowed: "
            f"{', '.join(FAMILIES)}, or adapter 'lora'"
        )
    if spec.stack == "lean":
        raise UnsupportedError(
            "adapter: 'adaption_prompt' has no lean step; allowed: stack 'stock'"
        )
    wanted, layers = spec.adaption_prompt.adapter_layers, model.text.num_hidden_layers
    if wanted > layers:
        raise InputError(
            Problem("adaption_prompt.adapter_layers", "are more than the model has", wanted,
                    f"at most {layers}")
        )  # fmt: skip
    tree, paths = _with_prompts(model.tree, model.text, spec.adaption_prompt)
    outliers = outlier_model(spec, model.text)
    return Loaded(spec, tree, frozenset(), trained=paths, outliers=outliers)


@lru_cache(maxsize=8)
def _with_prompts(
    tree: ModelTree, text: DecoderGeometry, prompt: AdaptionPrompt
) -> tuple[ModelTree, frozenset[str]]:
    """The tree with the adapters, and their paths: of the attention modules that are wrapped."""
    first = text.num_hidden_layers - prompt.adapter_layers
    wrapped = {f"model.layers.{index}.self_attn" for index in range(first, text.num_hidden_layers)}
    shapes = ((PROMPT, (1, prompt.adapter_len, text.hidden_size)), (GATE, (1,)))

    def modules() -> Iterator[Module]:
        for module in tree.modules:
            path = module.path.rpartition(".")[0]
            if path in wrapped and module.path.endswith(".q_proj"):  # the first of its modules
                yield Module(path, "other", "adapter", shapes)
            yield module

    return ModelTree(tuple(modules())), frozenset(wrapped)


def prompted(
    t: Engine, loaded: Loaded, path: str, geometry: DecoderGeometry, hidden: Tensor, output: Tensor,
    rotate: Any,
) -> Tensor:  # fmt: skip
    """AdaptedAttention.forward after the attention itself: `output` and what the prompts add.

    rotate: (B, h, S, d) -> the same with rotary positions; path: of the attention, with its dot.
    """
    g, batch = geometry, hidden.shape[0]
    prompt = loaded.parameter(path[:-1], PROMPT)
    key = nn.linear(t, loaded.linear(f"{path}k_proj"), prompt)
    value = nn.linear(t, loaded.linear(f"{path}v_proj"), prompt)
    with t.recorder.scope(path[:-1]):
        k, v = _repeated(t, key, g, batch), _repeated(t, value, g, batch)
        k, v = _interleaved(t, k, g), _interleaved(t, v, g)
    query = _queries(t, loaded, path, g, hidden, rotate)
    with t.recorder.scope(path[:-1]):
        dtype = query.dtype
        raw = matmul(t, query, t.to(k, dtype), transposed=True)
        scores = t.scale(raw, "div")
        del raw
        weights = t.to(softmax(t, scores), dtype)
        scores = t.mul(loaded.parameter(path[:-1], GATE), weights)
        del weights
        mixed = matmul(t, scores, v)
        added = t.reshape(t.transpose(mixed, 1, 2), (*hidden.shape[:2], g.attention_width))
        del mixed
    added = nn.linear(t, loaded.linear(f"{path}o_proj"), added)
    with t.recorder.scope(path[:-1]):
        return t.to(t.add(output, added), dtype)


def _repeated(t: Engine, x: Tensor, g: DecoderGeometry, batch: Any) -> Tensor:
    """x.view(1, L, k, d).repeat(B, 1, 1, 1).transpose(1, 2): a copy a sample; backward sums."""
    length, heads = x.shape[1], g.num_key_value_heads
    x = t.alias(x, (1, length, heads, g.head_dim), True)
    source, shape = x.shape, (batch, length, heads, g.head_dim)
    out = t.new(shape, x.dtype, "repeat")
    t.count(2 * grad_bytes(out))

    def backward(g: Tensor) -> tuple[Tensor]:
        t.count(2 * grad_bytes(g))
        return (t.new(source, g.dtype, "sum (repeat)"),)

    return t.transpose(t.record(out, (x,), (), backward), 1, 2)


def _interleaved(t: Engine, x: Tensor, g: DecoderGeometry) -> Tensor:
    """torch.repeat_interleave over the heads: a copy, also where each is wanted once."""
    batch, heads, length, width = source = x.shape
    groups = g.num_attention_heads // g.num_key_value_heads
    out = t.new((batch, heads * groups, length, width), x.dtype, "repeat_interleave")
    t.count(2 * grad_bytes(out))

    def backward(grad: Tensor) -> tuple[Tensor]:
        if groups == 1:
            return (grad.view(source),)
        t.count(2 * grad_bytes(grad))
        return (t.new(source, grad.dtype, "sum (repeat_interleave)"),)

    return t.record(out, (x,), (), backward)


def _queries(
    t: Engine, loaded: Loaded, path: str, g: DecoderGeometry, hidden: Tensor, rotate: Any
) -> Tensor:
    """llama_compute_query_states: q again, and v, which is not used."""
    batch, length, _ = hidden.shape
    query = nn.linear(t, loaded.linear(f"{path}q_proj"), hidden)
    query = t.alias(query, (batch, length, g.num_attention_heads, g.head_dim), True)
    query = t.transpose(query, 1, 2)
    value = nn.linear(t, loaded.linear(f"{path}v_proj"), hidden)
    with t.recorder.scope(path[:-1]):
        turned: Tensor = rotate(query)
    del value
    return turned
