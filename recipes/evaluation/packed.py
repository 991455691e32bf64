"""Many questions in one row of tokens: no padding meets a linear, the shared prefix is run once.

The model is given one sequence, `[prefix] question question ...`, each question's positions counted
from the end of the prefix. Its attention is replaced by one that lets a question see the prefix and
itself alone: inside layers whose layout is known (recipes.evaluation.packed_layer), elsewhere
through transformers' attention interface.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.backends.cuda import SDPAParams, can_use_flash_attention
from transformers import AttentionInterface

from recipes.evaluation.packed_layer import is_known, run_layer
from recipes.layers import decoder_layers

NAME = "vramwise_packed"

KeyValue = tuple[Tensor, Tensor]


@dataclass(frozen=True, slots=True)
class _Spans:
    """Who asks and what each sees, sequence by sequence: the lengths of both, and the places seen
    (None where each sees itself alone), counted where a kept prefix stands in front."""

    asks: tuple[int, ...]
    sees: tuple[int, ...]
    places: Tensor | None
    asks_ends: Tensor
    sees_ends: Tensor


@dataclass(slots=True)
class Pack:
    """Questions laid end to end. prefix: how many tokens of the shared prefix precede them here
    (none where `past` holds its keys and values, by layer); ids and positions (1, T); ends: each
    question's last place."""

    ids: Tensor
    positions: Tensor
    ends: Tensor
    prefix: int
    whole: _Spans
    last: _Spans
    past: dict[int, KeyValue] = field(default_factory=dict)
    calls: int = 0

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, scaling: float, *, last: bool = False
    ) -> Tensor:
        """query (T, H, D), or (questions, H, D) of their ends where `last`; key and value (T, K, D)
        of the next layer -> as query."""
        layer, self.calls = self.calls, self.calls + 1
        if self.prefix:
            self.past[layer] = (key[: self.prefix].clone(), value[: self.prefix].clone())
        elif layer in self.past:
            before = self.past[layer]
            key, value = (torch.cat(pair) for pair in zip(before, (key, value), strict=True))
        spans = self.last if last else self.whole
        if spans.places is not None:
            key, value = key[spans.places], value[spans.places]
        return _causal(query, key, value, spans, scaling)


def can_pack(base: Any, longest: int) -> bool:
    """Whether the language model's attention is plain: no soft cap, no window shorter than
    `longest` tokens, prefix included."""
    config = base.config.get_text_config()
    if getattr(config, "attn_logit_softcapping", None) is not None:
        return False
    window = getattr(config, "sliding_window", None)
    return window is None or window >= longest


def pack(
    prefix: Sequence[int], rows: Sequence[Sequence[int]], past: dict[int, KeyValue],
    device: torch.device,
) -> Pack:  # fmt: skip
    """Lay `rows` behind `prefix`; where `past` already holds the prefix's keys and values, its
    tokens are left out."""
    shared, head = len(prefix), 0 if past else len(prefix)
    lengths = torch.tensor([len(row) for row in rows])
    starts = head + _before(lengths)
    ids = torch.tensor([*prefix[:head], *itertools.chain.from_iterable(rows)])
    # Within a question, what it sees: the prefix, and its own tokens behind it.
    sees = shared + lengths
    offset = _counted(sees)
    first = (starts + (shared - head)).repeat_interleave(sees)
    places = torch.where(offset < shared, offset, first + offset - shared)
    positions = torch.cat((torch.arange(head), shared + _counted(lengths)))
    own = torch.tensor([head] if head else [], dtype=torch.long)  # here the prefix asks too

    def spans(asks: Tensor, sees: Tensor, places: Tensor) -> _Spans:
        return _Spans(
            tuple(asks.tolist()), tuple(sees.tolist()), places.to(device) if shared else None,
            _ends(asks).to(device), _ends(sees).to(device),
        )  # fmt: skip

    return Pack(
        ids[None].to(device), positions[None].to(device), (starts + lengths - 1).to(device), head,
        spans(torch.cat((own, lengths)), torch.cat((own, sees)),
              torch.cat((torch.arange(head), places))),
        spans(torch.ones_like(lengths), sees, places), past,
    )  # fmt: skip


@contextmanager
def packed_attention(base: Any, packed: Pack) -> Iterator[None]:
    """Within: the language model's attention is the packed one, over `packed`. Where the layers'
    layout is known, the model's hidden states are those of the questions' ends alone.

    Raises RuntimeError at the end where a layer did not come through: its answers would be those of
    one long text.
    """
    config = base.config.get_text_config()
    interface = config._attn_implementation_internal
    layers: list[Any] = decoder_layers(base)
    layers = layers if all(map(is_known, layers)) else []
    forwards = [layer.__dict__.get("forward") for layer in layers]

    config._attn_implementation_internal = NAME
    _CURRENT.append(packed)
    for layer in layers:
        layer.forward = partial(run_layer, layer, packed, last=layer is layers[-1])
    try:
        yield
    finally:
        _CURRENT.pop()
        config._attn_implementation_internal = interface
        for layer, forward in zip(layers, forwards, strict=True):
            if forward is None:
                del layer.forward
            else:
                layer.forward = forward
    if packed.calls != config.num_hidden_layers:
        raise RuntimeError(f"{packed.calls} of {config.num_hidden_layers} layers were packed")


# The pack that is being run: transformers hands its attention no word of the caller's.
_CURRENT: list[Pack] = []


def _interface(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, *, scaling: float, **_: Any
) -> tuple[Tensor, None]:
    query, key, value = (states[0].transpose(0, 1) for states in (query, key, value))
    return _CURRENT[-1].attend(query, key, value, scaling)[None], None


AttentionInterface.register(NAME, _interface)


def _causal(query: Tensor, key: Tensor, value: Tensor, spans: _Spans, scaling: float) -> Tensor:
    """Causal attention in each span; its last query sees its last key."""
    if _flash_takes(query, key):
        # Its causal mask is aligned at the end of both (torch.nn.attention.bias).
        out: Tensor = torch.ops.aten._flash_attention_forward(
            query, key, value, spans.asks_ends, spans.sees_ends, max(spans.asks), max(spans.sees),
            0.0, True, False, scale=scaling,
        )[0]  # fmt: skip
        return out
    asked, seen = (
        query.split(spans.asks),
        zip(key.split(spans.sees), value.split(spans.sees), strict=True),
    )
    return torch.cat([
        _alone(q, k, v, scaling) for q, (k, v) in zip(asked, seen, strict=True)
    ])  # fmt: skip


def _alone(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    """The same in one span: query (L, H, D), key and value (S, K, D) -> (L, H, D)."""
    length, seen = len(query), len(key)
    mask = torch.ones(length, seen, dtype=torch.bool, device=query.device).tril(seen - length)
    q, k, v = (states.transpose(0, 1)[None] for states in (query, key, value))
    out = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, scale=scaling, enable_gqa=q.shape[1] != k.shape[1]
    )
    return out[0].transpose(0, 1)


def _flash_takes(query: Tensor, key: Tensor) -> bool:
    q, k = (states[:1].transpose(0, 1)[None] for states in (query, key))
    grouped = q.shape[1] != k.shape[1]
    return can_use_flash_attention(SDPAParams(q, k, k, None, 0.0, True, grouped))


def _before(lengths: Tensor) -> Tensor:
    """Where each of so long spans starts."""
    return lengths.cumsum(0) - lengths


def _counted(lengths: Tensor) -> Tensor:
    """0, 1, ... anew in each of so long spans."""
    return torch.arange(int(lengths.sum())) - _before(lengths).repeat_interleave(lengths)


def _ends(lengths: Tensor) -> Tensor:
    """0 and the running sums, int32, as flash attention takes its sequences."""
    return torch.cat((lengths.new_zeros(1), lengths.cumsum(0))).to(torch.int32)
