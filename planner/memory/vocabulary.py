"""The two ends of a language model: the embedding of token ids, and the vocabulary's loss."""

from __future__ import annotations

from math import prod
from typing import Any

from planner.dtypes import F32, INT64
from planner.memory.layers import Adapter, matmul
from planner.memory.ops import Engine
from planner.memory.tensor import Tensor
from planner.memory.work import grad_bytes


def embedding(t: Engine, weight: Tensor, ids: Tensor) -> Tensor:
    """F.embedding: saves the ids; a trainable table gets a dense gradient."""
    width = weight.shape[-1]
    out = t.new((*ids.shape, width), weight.dtype, "embedding")
    t.count(2 * grad_bytes(out))
    shape, dtype = weight.shape, weight.dtype

    rows = prod(ids.shape)

    def backward(g: Tensor) -> tuple[Tensor]:
        # EmbeddingBackwardKernel.cu: above 3,072 ids a sorted sum with an fp32 partial row for
        # every ten ids and for every distinct one.
        t.count(prod(shape) * dtype.itemsize + 3 * grad_bytes(g), 3)
        grad = t.new(shape, dtype, "embedding (weight gradient)")
        sorts = rows > 3072
        order = [t.new((rows * sorts,), INT64, "embedding (sort)") for _ in range(4)]
        partial_rows = (rows // 10 + minimum(rows, shape[0])) * sorts
        partial = t.new((partial_rows, width), F32, "embedding (partial sums)")
        del order, partial
        return (grad,)

    return t.record(out, (weight,), (ids,), backward)


def lora_embedding(t: Engine, out: Tensor, ids: Tensor, adapter: Adapter, scales: int) -> Tensor:
    """peft/tuners/lora/layer.py, Embedding.forward: a row of A' for each id, times B, scaled (twice
    where the embedding itself is); added to the embedding in the wider dtype."""
    source = out.dtype
    low = embedding(t, t.transpose(adapter.a, 0, 1), ids)
    added = matmul(t, low, adapter.b)
    del low
    for _ in range(scales):
        added = t.scale(added)
    out = t.add(out, added, "add (adapter)")
    del added
    return t.to(out, source)


def minimum(a: Any, b: Any) -> Any:
    """min of ints, element-wise of arrays."""
    if isinstance(a, int) and isinstance(b, int):
        return min(a, b)
    return a + (b - a) * (b < a)


def causal_lm_loss(t: Engine, logits: Tensor, labels: Tensor) -> Tensor:
    """ForCausalLMLoss (transformers/loss/loss_utils.py): fp32 logits, shifted labels, summed
    cross-entropy divided by the number of items."""
    rows, vocab = prod(logits.shape[:-1]), logits.shape[-1]
    logits = t.to(logits, F32, "float (logits)")
    padded = t.new((*labels.shape[:-1], labels.shape[-1] + 1), INT64, "pad (labels)")
    targets = t.new(labels.shape, INT64, "contiguous (labels)")
    flat = t.alias(logits, (rows, vocab), True)
    return _cross_entropy(t, flat, targets, padded)


def _cross_entropy(t: Engine, logits: Tensor, targets: Tensor, padded: Tensor) -> Tensor:
    shape = logits.shape
    traffic = prod(shape) * 4
    t.count(2 * traffic)
    log_probs = t.new(shape, F32, "log_softmax", "logits")

    def softmax_backward(g: Tensor) -> tuple[Tensor]:
        t.count(3 * traffic)
        return (t.new(shape, F32, "log_softmax (backward)", "logits"),)

    log_probs = t.record(log_probs, (logits,), (log_probs,), softmax_backward)
    loss = t.new((), F32, "nll_loss")
    weight = t.new((), F32, "nll_loss")

    def nll_backward(g: Tensor) -> tuple[Tensor]:
        t.count(traffic, 2)
        return (t.new(shape, F32, "nll_loss (backward)", "logits"),)

    loss = t.record(loss, (log_probs,), (log_probs, targets, weight), nll_backward)
    return t.scale(loss, "div")


def mask_columns(t: Engine, logits: Tensor, columns: int) -> Tensor:
    """Chameleon: logits[:, :, image_tokens] = finfo.min, an index_put_ in place."""
    index = t.new((columns,), INT64, "image token ids")
    shape, dtype = logits.shape, logits.dtype
    out = logits.view(shape)

    def backward(g: Tensor) -> tuple[Tensor]:
        t.count(2 * prod(shape) * dtype.itemsize, 2)
        return (t.new(shape, dtype, "index_put (backward)", "logits"),)

    return t.record(out, (logits,), (index,), backward)
