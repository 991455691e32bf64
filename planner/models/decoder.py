"""The decoder stack that every family shares: what its config says, and its modules as torch
names them. A family file states where its stack differs; nothing is guessed here."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import cycle, islice
from typing import Literal, NamedTuple, get_args

from planner.models.reading import Reader
from planner.models.tree import Component, Kind, Module

Norm = Literal["rms", "gemma_rms"]
QkNorm = Literal["none", "rms", "chameleon"]
Attention = Literal["full_attention", "sliding_attention"]
FULL: Attention = "full_attention"
SLIDING: Attention = "sliding_attention"


@dataclass(frozen=True, slots=True)
class DecoderGeometry:
    """Everything the modelling code of a decoder uses. Sizes are elements, not bytes.

    qkv_bias, output_bias, mlp_bias: which projections carry a bias. qk_norm: "rms" is one weight a
    head dimension, "chameleon" a LayerNorm with a weight and bias for every head. swin_norm: norms
    after attention and MLP instead of before. sandwich_norms: Gemma's four norms a layer.
    fused_projections: Phi-3's qkv_proj and gate_up_proj. embedding_scale: Gemma multiplies the
    embeddings by sqrt(hidden_size). attention_scalar: the scores are divided by its square root.
    layer_types: one entry a layer; sliding layers see `sliding_window` tokens back.
    rotary_by_layer_type: Gemma 3 has a rotary table for each kind of layer.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    hidden_act: str
    max_position_embeddings: int
    rms_norm_eps: float
    tie_word_embeddings: bool
    layer_types: tuple[Attention, ...]
    sliding_window: int | None = None
    norm: Norm = "rms"
    qk_norm: QkNorm = "none"
    swin_norm: bool = False
    sandwich_norms: bool = False
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    fused_projections: bool = False
    embedding_scale: bool = False
    attention_scalar: float | None = None
    attn_logit_softcapping: float | None = None
    final_logit_softcapping: float | None = None
    bidirectional: bool = False
    attention_dropout: float = 0.0
    resid_pdrop: float = 0.0
    embd_pdrop: float = 0.0
    rope_theta: float = 10_000.0
    partial_rotary_factor: float = 1.0
    rotary_by_layer_type: bool = False

    @property
    def text(self) -> DecoderGeometry:
        """Itself: so that `geometry.text` is the decoder whatever the family."""
        return self

    @property
    def attention_width(self) -> int:
        """Width of the queries, all heads together."""
        return self.num_attention_heads * self.head_dim

    @property
    def key_value_width(self) -> int:
        """Width of the keys (and of the values), all heads together."""
        return self.num_key_value_heads * self.head_dim


class Defaults(NamedTuple):
    """What transformers takes for a key that config.json leaves out.

    `required` sizes have a default too, used only for a decoder nested in a larger config, where
    published files lean on it; a plain decoder must state its own sizes.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int | None
    max_position_embeddings: int
    rms_norm_eps: float
    head_dim: int | None = None
    tie_word_embeddings: bool = False
    hidden_act: str = "silu"
    activation_key: str = "hidden_act"


def read_decoder(reader: Reader, model_type: str, given: Defaults, nested: bool) -> DecoderGeometry:
    """The keys that all decoders have. A family refines the result with `dataclasses.replace`.

    Problems are noted in the reader, to be raised by its `check()`.
    """

    def size(key: str) -> int:
        return reader.size(key, getattr(given, key)) if nested else reader.size(key)

    layers, heads = size("num_hidden_layers"), size("num_attention_heads")
    if layers > 4096:
        reader.reject("num_hidden_layers", "is absurd", layers, "at most 4,096")
        layers = 1
    hidden = size("hidden_size")
    key_value_heads = (
        reader.optional_size("num_key_value_heads", given.num_key_value_heads) or heads
    )
    geometry = DecoderGeometry(
        model_type=model_type,
        vocab_size=size("vocab_size"),
        hidden_size=hidden,
        intermediate_size=size("intermediate_size"),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads,
        head_dim=reader.optional_size("head_dim", given.head_dim) or max(hidden // heads, 1),
        hidden_act=reader.text(given.activation_key, given.hidden_act),
        max_position_embeddings=reader.size(
            "max_position_embeddings", given.max_position_embeddings, high=1 << 31
        ),
        rms_norm_eps=reader.number("rms_norm_eps", given.rms_norm_eps, high=1.0),
        tie_word_embeddings=reader.flag("tie_word_embeddings", given.tie_word_embeddings),
        layer_types=(FULL,) * layers,
        attention_dropout=reader.number("attention_dropout", 0.0, high=1.0),
        rope_theta=_rope_theta(reader),
    )
    if reader.sound:
        _check_heads(reader, geometry)
    return geometry


def _check_heads(reader: Reader, geometry: DecoderGeometry) -> None:
    heads, key_value_heads = geometry.num_attention_heads, geometry.num_key_value_heads
    if not reader.has("head_dim") and geometry.hidden_size % heads:
        reader.reject("num_attention_heads", f"does not divide hidden_size {geometry.hidden_size}",
                      heads)  # fmt: skip
    if heads % key_value_heads:
        reader.reject("num_key_value_heads", f"does not divide num_attention_heads {heads}",
                      key_value_heads)  # fmt: skip


def _rope_theta(reader: Reader) -> float:
    """From transformers 5's `rope_parameters`, or the older top-level key."""
    inner = reader.inner("rope_parameters")
    return inner.number("rope_theta", reader.number("rope_theta", 10_000.0))


def with_windows(geometry: DecoderGeometry, kind: Attention, window: int | None) -> DecoderGeometry:
    """`geometry` with every layer of one kind."""
    types = (kind,) * geometry.num_hidden_layers
    return replace(geometry, layer_types=types, sliding_window=window)


def with_pattern(
    reader: Reader, geometry: DecoderGeometry, pattern: Sequence[Attention], window: int | None
) -> DecoderGeometry:
    """`geometry` with `layer_types` as config.json lists them, or else `pattern` repeated."""
    layers = geometry.num_hidden_layers
    listed = reader.raw("layer_types")
    known = get_args(Attention)
    if listed is not None and (
        not isinstance(listed, list) or len(listed) != layers or any(t not in known for t in listed)
    ):
        reader.reject("layer_types", "is not one known type a layer", listed, ", ".join(known))
        listed = None
    types = tuple(listed) if listed else tuple(islice(cycle(pattern), layers))
    return replace(geometry, layer_types=types, sliding_window=window)


def late_windows(
    reader: Reader, geometry: DecoderGeometry, default_full_layers: int
) -> DecoderGeometry:
    """Qwen's rule: with `use_sliding_window`, layers from `max_window_layers` on are sliding."""
    layers = geometry.num_hidden_layers
    window = reader.optional_size("sliding_window", 4096)
    if not reader.flag("use_sliding_window", False):
        window = None
    first = reader.size("max_window_layers", default_full_layers, low=0) if window else layers
    full = (FULL,) * min(first, layers)
    sliding = (SLIDING,) * (layers - len(full))
    return with_pattern(reader, geometry, full + sliding, window)


def linear(path: str, component: Component, in_features: int, out_features: int,
           bias: bool = False, tied_to: str | None = None) -> Module:  # fmt: skip
    """A `torch.nn.Linear`."""
    weight: tuple[tuple[str, tuple[int, ...]], ...] = (("weight", (out_features, in_features)),)
    shapes = (*weight, ("bias", (out_features,))) if bias else weight
    return Module(path, "linear", component, shapes, tied_to)


def weighted(path: str, kind: Kind, component: Component, *shape: int,
             bias: int | None = None) -> Module:  # fmt: skip
    """A module with a `weight` of `shape` and, where `bias` is given, a bias of that length."""
    weight: tuple[tuple[str, tuple[int, ...]], ...] = (("weight", shape),)
    return Module(path, kind, component, weight if bias is None else (*weight, ("bias", (bias,))))


def layer_norm(path: str, component: Component, width: int) -> Module:
    """A `torch.nn.LayerNorm` or `GroupNorm` with weight and bias."""
    return weighted(path, "norm", component, width, bias=width)


def stack_modules(geometry: DecoderGeometry, prefix: str) -> Iterator[Module]:
    """embed_tokens, layers and norm under `prefix` ("model."), in torch's order."""
    g = geometry
    yield weighted(f"{prefix}embed_tokens", "embedding", "embeddings", g.vocab_size, g.hidden_size)
    for index in range(g.num_hidden_layers):
        yield from _layer_modules(g, f"{prefix}layers.{index}.")
    yield weighted(f"{prefix}norm", "norm", "language_model", g.hidden_size)


def head_module(geometry: DecoderGeometry, prefix: str, tied: bool) -> Module:
    """lm_head, tied to `prefix`embed_tokens or with a weight of its own."""
    tied_to = f"{prefix}embed_tokens" if tied else None
    return linear("lm_head", "lm_head", geometry.hidden_size, geometry.vocab_size, tied_to=tied_to)


def _layer_modules(g: DecoderGeometry, prefix: str) -> Iterator[Module]:
    yield from _attention_modules(g, f"{prefix}self_attn.")
    yield from _mlp_modules(g, f"{prefix}mlp.")
    names = ["input_layernorm", "post_attention_layernorm"]
    if g.sandwich_norms:
        names += ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
    for name in names:
        yield weighted(prefix + name, "norm", "language_model", g.hidden_size)


def _attention_modules(g: DecoderGeometry, prefix: str) -> Iterator[Module]:
    q, kv, hidden = g.attention_width, g.key_value_width, g.hidden_size
    output = linear(f"{prefix}o_proj", "language_model", q, hidden, g.output_bias)
    if g.fused_projections:
        yield output  # torch's order: Phi-3 makes o_proj first
        yield linear(f"{prefix}qkv_proj", "language_model", hidden, q + 2 * kv, g.qkv_bias)
        return
    for name, width in (("q_proj", q), ("k_proj", kv), ("v_proj", kv)):
        yield linear(prefix + name, "language_model", hidden, width, g.qkv_bias)
    yield output
    for name, heads in (("q_norm", g.num_attention_heads), ("k_norm", g.num_key_value_heads)):
        if g.qk_norm == "rms":
            yield weighted(prefix + name, "norm", "language_model", g.head_dim)
        elif g.qk_norm == "chameleon":
            shape = (heads, g.head_dim)
            shapes = (("weight", shape), ("bias", shape))
            yield Module(prefix + name, "norm", "language_model", shapes)


def _mlp_modules(g: DecoderGeometry, prefix: str) -> Iterator[Module]:
    hidden, width = g.hidden_size, g.intermediate_size
    names = ("gate_up_proj",) if g.fused_projections else ("gate_proj", "up_proj")
    for name in names:
        out_features = width * 2 // len(names)
        yield linear(prefix + name, "language_model", hidden, out_features, g.mlp_bias)
    yield linear(f"{prefix}down_proj", "language_model", width, hidden, g.mlp_bias)
