"""Layers as transformers, peft and bitsandbytes run them: linears of every storage kind, adapters,
norms, embeddings, attention kernels and the loss.

The order of statements is the modelling code's own, and so are the lifetimes: a local name here
holds a tensor exactly as long as it does there.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any, Literal

from planner.dtypes import DType
from planner.memory.ops import F32, Engine, grad_bytes
from planner.memory.tensor import Tensor

BF16, F16 = DType.BFLOAT16, DType.FLOAT16
INT8, INT32, UINT8, INT64 = DType.INT8, DType.INT32, DType.UINT8, DType.INT64

Quantization = Literal["none", "4bit", "int8"]


@dataclass(slots=True)
class Adapter:
    """LoRA on one linear: A (rank, in), B (out, rank)."""

    a: Tensor
    b: Tensor
    dropout: float


@dataclass(slots=True)
class Linear:
    """A linear's state after loading and adapter set-up. Weight storages are accounted for by
    loading, so the tensors here carry shape and dtype only."""

    name: str
    in_features: int
    out_features: int
    weight: Tensor
    bias: Tensor | None = None
    quantization: Quantization = "none"
    double_quant: bool = False
    compute_dtype: DType = BF16
    adapter: Adapter | None = None
    casts_adapter_input: bool = False  # peft's plain Linear casts x to the adapter's dtype


def linear(t: Engine, state: Linear, x: Tensor) -> Tensor:
    """A linear of any storage kind, with its adapter where it has one."""
    outer, t.recorder.module = t.recorder.module, state.name
    try:
        if state.adapter is None:
            return base_linear(t, state, x)
        return _lora_linear(t, state, state.adapter, x)
    finally:
        t.recorder.module = outer


def _lora_linear(t: Engine, state: Linear, adapter: Adapter, x: Tensor) -> Tensor:
    """peft/tuners/lora: layer.py Linear.forward, bnb.py Linear4bit and Linear8bitLt.forward."""
    result = base_linear(t, state, x)
    result_dtype = result.dtype
    if state.quantization == "4bit":
        result = t.clone(result)
    converts = state.quantization != "none" and t.autocast_dtype is None
    if state.quantization == "none" or converts:
        x = t.to(x, adapter.a.dtype, "to (adapter input)")
    dropped = t.dropout(x, adapter.dropout)
    low = matmul(t, dropped, adapter.a)
    del dropped
    output = matmul(t, low, adapter.b)
    del low
    output = t.scale(output)
    if converts:
        output = t.to(output, result_dtype)
    result = t.add(result, output, "add (adapter)")
    del output
    return t.to(result, result_dtype) if state.quantization == "none" else result


def base_linear(t: Engine, state: Linear, x: Tensor) -> Tensor:
    """The base layer alone."""
    if state.quantization == "4bit":
        source = x.dtype
        x = t.to(x, state.compute_dtype, "to (compute dtype)")
        bias = t.to(state.bias, state.compute_dtype) if state.bias is not None else None
        return t.to(_matmul_4bit(t, state, x, bias), source, "to (4-bit output)")
    if state.quantization == "int8":
        return _matmul_int8(t, state, x)
    return matmul(t, x, state.weight, state.bias)


def matmul(t: Engine, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear: mm (or addmm) of the flattened input; saves what the other's gradient needs."""
    x, weight = t.lower(x), t.lower(weight)
    if bias is not None:
        bias = t.lower(bias)
    out_features, in_features = weight.shape
    rows, shape = prod(x.shape[:-1]), x.shape
    dtype, item = x.dtype, x.dtype.itemsize
    flops = 2 * rows * in_features * out_features
    traffic = item * (rows * (in_features + out_features) + in_features * out_features)
    need_x, need_w, need_b = (
        x.requires_grad, weight.requires_grad, bias is not None and bias.requires_grad
    )  # fmt: skip
    saved = (weight if need_x else None, x if need_w else None)
    t.about_to_save(saved)
    t.count_matmul(flops, traffic, dtype)
    out = t.new((*shape[:-1], out_features), dtype, "mm")

    def backward(g: Tensor) -> tuple[Tensor | None, ...]:
        grad_x = grad_w = grad_b = None
        if not g.contiguous:
            g = t.new(g.shape, g.dtype, "contiguous (backward)")
        if need_b:
            grad_b = t.new((out_features,), dtype, "sum (bias gradient)")
        if need_w:
            t.count_matmul(flops, traffic, dtype)
            grad_w = t.new((out_features, in_features), dtype, "mm (weight gradient)")
            grad_w.based = True  # transposed twice
        if need_x:
            t.count_matmul(flops, traffic, dtype)
            grad_x = t.new(shape, dtype, "mm (input gradient)")
            grad_x.based = len(shape) > 2  # the view of rows
        return grad_x, grad_w, grad_b

    return t.record(out, (x, weight, bias), saved, backward)


def _absmax(t: Engine, state: Linear, copies: int) -> list[Tensor]:
    """The fp32 absmax of a doubly quantised weight, one a block of 64 weights."""
    size = state.in_features * state.out_features
    t.count(size // 8 if state.double_quant else 0, copies if state.double_quant else 0)
    return [
        t.new((size // 64,), F32, "dequantize (absmax)") for _ in range(copies * state.double_quant)
    ]


def _dequantize(t: Engine, state: Linear, dtype: DType, op: str) -> Tensor:
    """The 16-bit weight, from 4 bits."""
    t.count(state.in_features * state.out_features * (0.5 + dtype.itemsize))
    return t.new((state.out_features, state.in_features), dtype, op)


def _matmul_4bit(t: Engine, state: Linear, x: Tensor, bias: Tensor | None) -> Tensor:
    """MatMul4Bit (bitsandbytes/autograd/_functions.py): keeps the packed weight only; the weight
    is dequantised for the product in both directions."""
    rows, shape, dtype = prod(x.shape[:-1]), x.shape, x.dtype
    n, k = state.out_features, state.in_features
    flops = 2 * rows * n * k
    traffic = dtype.itemsize * (rows * (n + k) + n * k)
    # backends/cuda/ops.py, _dequant_linear_fallback: the absmax and its shifted copy live as long
    # as the weight.
    absmax = _absmax(t, state, 2)
    weight = _dequantize(t, state, dtype, "dequantize")
    t.count_matmul(flops, traffic, dtype)
    out = t.new((*shape[:-1], n), dtype, "mm")
    del weight, absmax

    def backward(g: Tensor) -> tuple[Tensor | None, ...]:
        absmax = _absmax(t, state, 1)  # functional.dequantize_4bit shifts it in place
        dequantized = _dequantize(t, state, dtype, "dequantize (backward)")
        del absmax
        t.count_matmul(flops, traffic, dtype)
        grad = t.new(shape, dtype, "mm (input gradient)")
        del dequantized
        return grad, None

    return t.record(out, (x, bias), (), backward)


def _matmul_int8(t: Engine, state: Linear, x: Tensor) -> Tensor:
    """MatMul8bitLt: keeps its input as an attribute of ctx, out of checkpointing's reach."""
    rows, shape, dtype = prod(x.shape[:-1]), x.shape, x.dtype
    n, k = state.out_features, state.in_features
    flops, item = 2 * rows * n * k, dtype.itemsize
    half = t.to(x.detach(), F16, "to (int8 quantisation)")
    row_stats = t.new((rows,), F32, "int8 row stats")
    quantized = t.new((rows, k), INT8, "int8 quantised input")
    magnitude = t.new((rows, k), F16, "abs (outliers)")
    outliers = t.new((rows, k), DType.BOOL, "ge (outliers)")
    del magnitude, outliers, half
    t.count(rows * k * 12, 8)
    accumulator = t.new((rows, n), INT32, "int8 mm")
    t.count_matmul(flops, rows * k + n * k + 4 * rows * n, F16)
    product = t.new((rows, n), F16, "int8 dequantise")
    del accumulator, quantized, row_stats
    t.count(rows * n * 6)
    out = product if dtype is F16 else t.new((*shape[:-1], n), dtype, "to (int8 output)")
    out = out.view((*shape[:-1], n))
    del product

    def backward(g: Tensor) -> tuple[Tensor | None, ...]:
        weight = t.new((n, k), dtype, "dequantise int8 (backward)")
        t.count(n * k * (1 + 4 * item), 2)
        cast = t._cast_raw(g, dtype)
        t.count_matmul(flops, item * (rows * (n + k) + n * k), dtype)
        grad = t.new(shape, dtype, "mm (input gradient)")
        del weight, cast
        return (grad,)

    if t.wants_grad(x) and x.storage is not None:
        x.storage.block.category = "saved_activations"
    return t.record(out, (x,), (), backward, kept=x.detach())


def rms_norm(t: Engine, weight: Tensor, x: Tensor) -> Tensor:
    """LlamaRMSNorm.forward: statistics in fp32, the weight applied in the input's dtype."""
    source = x.dtype
    h = t.to(x, F32)
    inverse = t.rsqrt(t.add_scalar(t.mean_last(t.pow2(h))))
    h = t.mul(h, inverse)
    return t.mul(weight, t.to(h, source))


def gemma_rms_norm(t: Engine, weight: Tensor, x: Tensor) -> Tensor:
    """Gemma2RMSNorm.forward: (1 + weight) applied in fp32, then back to the input's dtype."""
    source = x.dtype
    h = t.to(x, F32)
    h = t.mul(h, t.rsqrt(t.add_scalar(t.mean_last(t.pow2(h)))))
    h = t.mul(h, t.add_scalar(t.to(weight, F32)))
    return t.to(h, source)


def layer_norm(
    t: Engine, x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """F.layer_norm, an fp32 operation under autocast: saves its input and two statistics."""
    x = t.upper(x)
    if weight is not None and bias is not None:
        weight, bias = t.upper(weight), t.upper(bias)
    t.count(2 * grad_bytes(x))
    rows = prod(x.shape[:-1])
    out = t.new(x.shape, x.dtype, "layer_norm")
    mean = t.new((rows,), F32, "layer_norm statistics")
    rstd = t.new((rows,), F32, "layer_norm statistics")
    shape, dtype = x.shape, x.dtype
    need = (x.requires_grad, bool(weight is not None and weight.requires_grad),
            bool(bias is not None and bias.requires_grad))  # fmt: skip

    def backward(g: Tensor) -> tuple[Tensor | None, ...]:
        t.count(3 * prod(shape) * dtype.itemsize)
        grads = [t.new(shape, dtype, "layer_norm (backward)") if need[0] else None]
        grads += [t.new((shape[-1],), dtype, "layer_norm (backward)") if n else None
                  for n in need[1:]]  # fmt: skip
        return tuple(grads)

    return t.record(out, (x, weight, bias), (x, mean, rstd, weight), backward)


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


def minimum(a: Any, b: Any) -> Any:
    """min of ints, element-wise of arrays."""
    if isinstance(a, int) and isinstance(b, int):
        return min(a, b)
    return a + (b - a) * (b < a)


def gated_mlp(t: Engine, loaded: Any, prefix: str, x: Tensor, act: str) -> Tensor:
    """down(act(gate(x)) * up(x)); `loaded` gives the linears by path."""
    gate = linear(t, loaded.linear(f"{prefix}gate_proj"), x)
    with t.recorder.scope(f"{prefix}act_fn"):
        gate = t.activation(gate, act)
    up = linear(t, loaded.linear(f"{prefix}up_proj"), x)
    with t.recorder.scope(prefix.rstrip(".")):
        product = t.mul(gate, up)
    del gate, up
    return linear(t, loaded.linear(f"{prefix}down_proj"), product)


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
