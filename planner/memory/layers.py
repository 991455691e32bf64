"""Linear layers as transformers, peft and bitsandbytes run them: every storage kind, and adapters.

The order of statements is the modelling code's own, and so are the lifetimes: a local name here
holds a tensor exactly as long as it does there.
"""

# Annotations stay objects here: named tuples would compile each string at import.
from math import prod
from typing import Any, Literal, NamedTuple

from planner.dtypes import BF16, BOOL, F16, F32, INT8, INT32, INT64, DType
from planner.memory.ops import Engine
from planner.memory.outliers import OutlierModel
from planner.memory.sizes import decide
from planner.memory.tensor import Tensor

Quantization = Literal["none", "4bit", "int8"]


class Adapter(NamedTuple):
    """LoRA on one linear: A (rank, in), B (out, rank)."""

    a: Tensor
    b: Tensor
    dropout: float


class Linear(NamedTuple):
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
    keeps_input: bool = False  # of 4 bits: bitsandbytes before 0.43.2
    outliers: OutlierModel | None = None  # of 8 bits, where inputs hold any
    adapter: Adapter | None = None


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
    bias, weight, x = t.lower_all(bias, weight, x)
    out_features, in_features = weight.shape
    rows, shape = prod(x.shape[:-1]), x.shape
    dtype, item = x.dtype, x.dtype.itemsize
    flops = 2 * rows * in_features * out_features
    traffic = item * (rows * (in_features + out_features) + in_features * out_features)
    need_x, need_w, need_b = (
        x.requires_grad, weight.requires_grad, bias is not None and bias.requires_grad
    )  # fmt: skip
    biased = bias is not None
    saved = (weight if need_x else None, x if need_w else None)
    t.about_to_save(saved)
    t.count_matmul(flops, traffic, dtype)
    out = t.new((*shape[:-1], out_features), dtype, "mm")

    def backward(g: Tensor) -> tuple[Tensor | None, ...]:
        grad_x = grad_w = grad_b = None
        if not g.contiguous:
            g = t.new(g.shape, g.dtype, "contiguous (backward)")
        # Autograd's generated code goes by the operands' names: mat2 (the weight) and self of mm;
        # mat1 (the input), mat2 and self (the bias) of addmm.
        for wanted in "xwb" if biased else "wx":
            if wanted == "w" and need_w:
                t.count_matmul(flops, traffic, dtype)
                grad_w = t.new((out_features, in_features), dtype, "mm (weight gradient)")
                grad_w.based = True  # transposed twice
            elif wanted == "x" and need_x:
                t.count_matmul(flops, traffic, dtype)
                grad_x = t.new(shape, dtype, "mm (input gradient)")
                grad_x.based = len(shape) > 2  # the view of rows
            elif wanted == "b" and need_b:
                grad_b = t.new((out_features,), dtype, "sum (bias gradient)")
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


def dequantized(t: Engine, state: Linear, dtype: DType) -> Tensor:
    """bitsandbytes.functional.dequantize_4bit: the absmax first, where it is quantised too."""
    absmax = _absmax(t, state, 1)
    weight = _dequantize(t, state, dtype, "dequantize")
    del absmax
    return weight


def _matmul_4bit(t: Engine, state: Linear, x: Tensor, bias: Tensor | None) -> Tensor:
    """MatMul4Bit (bitsandbytes/autograd/_functions.py): keeps the packed weight only; the weight
    is dequantised for the product in both directions.

    Before 0.43.2 it kept its input, too, which no gradient needs (bitsandbytes pull request 1270).
    Taken to be out of a checkpointed forward, as with the reentrant checkpoints of that time.
    """
    rows, shape, dtype = prod(x.shape[:-1]), x.shape, x.dtype
    n, k = state.out_features, state.in_features
    flops = 2 * rows * n * k
    traffic = dtype.itemsize * (rows * (n + k) + n * k)
    # backends/cuda/ops.py, _dequant_linear_fallback: the absmax and its shifted copy live as long
    # as the weight.
    absmax = _absmax(t, state, 2)
    weight = _dequantize(t, state, dtype, "dequantize")
    t.count_matmul(flops, traffic, dtype)
    product_dtype = t.autocast_dtype or dtype
    casts = []
    if product_dtype is not dtype:  # torch's own linear inside: autocast casts, the weight first
        casts = [t.new((n, k), product_dtype, "autocast"), t.new(shape, product_dtype, "autocast")]
    out = t.new((*shape[:-1], n), product_dtype, "mm")
    del casts, weight, absmax

    def backward(g: Tensor) -> tuple[Tensor | None, ...]:
        absmax = _absmax(t, state, 1)  # functional.dequantize_4bit shifts it in place
        dequantized = _dequantize(t, state, dtype, "dequantize (backward)")
        del absmax
        if g.dtype is not dtype:
            t.count(n * k * (dtype.itemsize + g.dtype.itemsize))
            dequantized = t.new((n, k), g.dtype, "to (dequantised)")
        t.count_matmul(flops, traffic, g.dtype)
        grad = t.new(shape, g.dtype, "mm (input gradient)")
        del dequantized
        return grad, None

    return t.record(out, (x, bias), (x,) if state.keeps_input else (), backward, kept=())


def _matmul_int8(t: Engine, state: Linear, x: Tensor) -> Tensor:
    """MatMul8bitLt: keeps its input as an attribute of ctx, out of checkpointing's reach, and the
    columns with outliers once more."""
    rows, shape, dtype = prod(x.shape[:-1]), x.shape, x.dtype
    n, k = state.out_features, state.in_features
    flops, item = 2 * rows * n * k, dtype.itemsize
    count: Any = 0
    if state.outliers is not None:
        batch, length = shape[:-1] if len(shape) == 3 else (1, rows)
        count = state.outliers.columns(state.name, k, n, batch, length)
    source = x.detach() if x.contiguous else t.clone(x.detach(), "reshape")
    half = t.to(source, F16, "to (int8 quantisation)")
    row_stats = t.new((rows,), F32, "int8 row stats")
    quantized = t.new((rows, k), INT8, "int8 quantised input")
    magnitude = t.new((rows, k), F16, "abs (outliers)")
    outliers = t.new((rows, k), BOOL, "ge (outliers)")
    del magnitude
    t.count(rows * k * 12, 8)
    kept: list[Tensor] = [source]
    del source
    columns = weights = None
    if decide(count > 0):
        kept.append(t.new((count,), INT64, "outlier columns"))
        del outliers, half
        columns, weights = _outlier_parts(t, x, rows, n, count)
        kept.append(columns)
    else:
        del outliers, half
    out = _int8_product(t, rows, n, dtype)
    t.count_matmul(flops, rows * k + n * k + 4 * rows * n, F16)
    if columns is not None and weights is not None:  # output.addmm(subA, subB), under autocast
        casts = t.lower_all(weights, columns, out)
        made = casts[-1].dtype
        t.count_matmul(2 * rows * n * count, made.itemsize * rows * (n + count), made)
        out = t.new((rows, n), made, "addmm (outliers)")
        del casts, weights, columns
    del quantized, row_stats
    out = out.view((*shape[:-1], n))

    def backward(g: Tensor) -> tuple[Tensor | None, ...]:
        weight = t.new((n, k), dtype, "dequantise int8 (backward)")
        t.count(n * k * (1 + 4 * item), 2)
        cast = t._cast_raw(g, dtype)
        t.count_matmul(flops, item * (rows * (n + k) + n * k), dtype)
        grad = t.new(shape, dtype, "mm (input gradient)")
        del weight, cast
        return (grad,)

    if t.wants_grad(x):
        for tensor in kept:
            if tensor.storage is not None:
                tensor.storage.block.category = "saved_activations"
    return t.record(out, (x,), (), backward, kept=tuple(kept))


def _outlier_parts(
    t: Engine, x: Tensor, rows: Any, n: int, count: Any
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """A[:, outlier_cols], and those columns of the weight: their codes, in fp32 twice, in A's."""
    columns = t.new((rows, count), x.dtype, "outlier columns of the input")
    codes = t.new((n, count), INT8, "outlier columns of the weight")
    scaled = t.new((n, count), F32, "int8 dequantise (outliers)")
    single = t.new((n, count), F32, "int8 dequantise (outliers)")
    del scaled
    if x.dtype is not F32:
        single = t.new((n, count), x.dtype, "to (outliers)")
    del codes
    t.count(2 * rows * count * x.dtype.itemsize + 16 * n * count, 5)
    return columns, single


def _int8_product(t: Engine, rows: Any, n: int, dtype: DType) -> Tensor:
    """int8_scaled_mm: int32, then fp16, then the wanted dtype, each a tensor of its own."""
    accumulator = t.new((rows, n), INT32, "int8 mm")
    product = t.new((rows, n), F16, "int8 dequantise")
    out = product if dtype is F16 else t.new((rows, n), dtype, "to (int8 output)")
    del product, accumulator
    t.count(rows * n * 6)
    return out


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
