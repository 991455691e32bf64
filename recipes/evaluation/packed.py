"""Many questions in one row of tokens: no padding meets a linear, the shared prefix is run once.

The model is given one sequence, `[prefix] question question ...`, each question's positions counted
from the end of the prefix. Its attention is replaced, through transformers' attention interface, by
one that lets a question see the prefix and itself alone; only there are questions padded, in
buckets of near lengths, which costs a percent of the forward.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import MethodType
from typing import Any

import torch
from torch import Tensor
from torch.backends.cuda import SDPAParams, can_use_flash_attention
from transformers import AttentionInterface

from recipes.layers import decoder_layers

NAME = "vramwise_packed"
_PADDING = 0.1  # of a bucket's tokens at most, where questions are many enough to choose from

KeyValue = tuple[Tensor, Tensor]


@dataclass(frozen=True, slots=True)
class _Bucket:
    """Questions padded to the longest of them. rows (B, L): places in the packed sequence, a
    question's last one repeated; seen (B, P + L): places of what they see, where the prefix stands
    in front; kept: flat places in (B*L) that are real; places: the same in the packed sequence."""

    rows: Tensor
    seen: Tensor
    kept: Tensor
    places: Tensor


@dataclass(slots=True)
class Pack:
    """Questions laid end to end. prefix: how many tokens of the shared prefix precede them here
    (none where `past` holds its keys and values, by layer); ids and positions (1, T); ends: each
    question's last place."""

    ids: Tensor
    positions: Tensor
    ends: Tensor
    prefix: int
    buckets: tuple[_Bucket, ...]
    past: dict[int, KeyValue] = field(default_factory=dict)
    calls: int = 0


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
    """Lay `rows`, longest first, behind `prefix`; where `past` already holds the prefix's keys and
    values, its tokens are left out."""
    head = [] if past else list(prefix)
    ids, positions, starts = list(head), list(range(len(head))), []
    for row in rows:
        starts.append(len(ids))
        ids += row
        positions += range(len(prefix), len(prefix) + len(row))
    spans = [(start, len(row)) for start, row in zip(starts, rows, strict=True)]

    def sent(values: Any) -> Tensor:
        return torch.tensor(values, device=device)

    shift = len(prefix) - len(head)
    buckets = tuple(_bucket(part, len(prefix), shift, device) for part in _parts(spans))
    ends = sent([start + length - 1 for start, length in spans])
    return Pack(sent([ids]), sent([positions]), ends, len(head), buckets, past)


@contextmanager
def packed_attention(base: Any, packed: Pack) -> Iterator[None]:
    """Within: the language model's attention is the packed one, over `packed`.

    Raises RuntimeError at the end where a layer did not come through transformers' attention
    interface: its answers would be those of one long text.
    """
    config = base.config.get_text_config()
    before = config._attn_implementation_internal

    config._attn_implementation_internal = NAME
    _CURRENT.append(packed)
    try:
        yield
    finally:
        _CURRENT.pop()
        config._attn_implementation_internal = before
    if packed.calls != config.num_hidden_layers:
        raise RuntimeError(f"{packed.calls} of {config.num_hidden_layers} layers were packed")


# The pack that is being run: an operator, opaque to compiled layers, takes tensors only.
_CURRENT: list[Pack] = []


@torch.library.custom_op("vramwise::packed_attention", mutates_args=())
def _attend(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    """query (1, H, T, D), key and value (1, K, T, D) of the next layer -> (1, T, H, D)."""
    packed = _CURRENT[-1]
    layer, packed.calls = packed.calls, packed.calls + 1
    out = query.new_empty(query.shape[2], query.shape[1], query.shape[3])
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # (T, heads, D)
    if packed.prefix:
        first = tuple(x[: packed.prefix].transpose(0, 1)[None] for x in (q, k, v))
        packed.past[layer] = (k[: packed.prefix].clone(), v[: packed.prefix].clone())
        out[: packed.prefix] = _causal(first[0], first[1], first[2], scaling)[0].transpose(0, 1)
    elif layer in packed.past:  # in front again, where the buckets look for it
        k, v = (torch.cat(pair) for pair in zip(packed.past[layer], (k, v), strict=True))
    for bucket in packed.buckets:
        asks, keys, values = q[bucket.rows], k[bucket.seen], v[bucket.seen]  # (B, ., heads, D)
        made = _causal(asks.transpose(1, 2), keys.transpose(1, 2), values.transpose(1, 2), scaling)
        out[bucket.places] = made.transpose(1, 2).flatten(0, 1)[bucket.kept]
    return out[None]


@_attend.register_fake
def _(query, key, value, scaling):  # type: ignore[no-untyped-def]
    return query.new_empty(1, query.shape[2], query.shape[1], query.shape[3])


def _interface(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, *, scaling: float, **_: Any
) -> tuple[Tensor, None]:
    return _attend(query, key, value, scaling), None


AttentionInterface.register(NAME, _interface)


@contextmanager
def compiled_layers(base: Any, wanted: bool) -> Iterator[None]:
    """Within, where wanted: the decoder layers run as generated kernels (ten seconds to make)."""
    layers: list[Any] = decoder_layers(base) if wanted else []
    before = [layer.__dict__.get("forward") for layer in layers]
    for layer in layers:
        layer.forward = torch.compile(MethodType(type(layer).forward, layer), dynamic=True)
    try:
        yield
    finally:
        for layer, forward in zip(layers, before, strict=True):
            if forward is None:
                del layer.forward
            else:
                layer.forward = forward


def _causal(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    """Causal attention whose last query sees the last key."""
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    if can_use_flash_attention(SDPAParams(query, key, value, None, 0.0, False, False)):
        # Its causal mask is aligned at the end of both (torch.nn.attention.bias); that module's
        # own tensor class is not seen from inside compiled layers.
        flash = torch.ops.aten._scaled_dot_product_flash_attention
        out: Tensor = flash(query, key, value, 0.0, True, False, scale=scaling)[0]
        return out
    length, seen = query.shape[2], key.shape[2]
    mask = torch.ones(length, seen, dtype=torch.bool, device=query.device).tril(seen - length)
    return torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, scale=scaling
    )


def _parts(spans: list[tuple[int, int]]) -> Iterator[list[tuple[int, int]]]:
    """Spans (start, length), longest first, cut where padding would pass its share."""
    part: list[tuple[int, int]] = []
    real = 0
    for span in spans:
        real += span[1]
        longest = part[0][1] if part else span[1]
        padded = longest * (len(part) + 1)
        if part and padded - real > _PADDING * padded:
            yield part
            part, real = [], span[1]
        part.append(span)
    if part:
        yield part


def _bucket(spans: list[tuple[int, int]], prefix: int, shift: int, device: torch.device) -> _Bucket:
    """shift: how much further back a place is once the prefix stands in front."""
    width = max(length for _, length in spans)
    rows = [[start + min(i, length - 1) for i in range(width)] for start, length in spans]
    seen = [[*range(prefix), *(place + shift for place in row)] for row in rows]
    kept = [row * width + i for row, (_, length) in enumerate(spans) for i in range(length)]
    places = [start + i for start, length in spans for i in range(length)]
    return _Bucket(*(torch.tensor(values, device=device) for values in (rows, seen, kept, places)))
