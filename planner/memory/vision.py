"""Operations of vision encoders: convolutions, group norm, pooling, the joining of image features
and text embeddings. What each saves is read from tools/autograd/derivatives.yaml."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

from planner.dtypes import BOOL, F32, INT64
from planner.memory.ops import Engine
from planner.memory.tensor import Shape, Tensor
from planner.memory.work import grad_bytes

_VECTOR_CHANNELS = 8
_CONV_MARGIN = 74  # elements of 16 bits: up to 147 bytes were seen


def _conv_workspace(x: Shape, weight: Shape, out: Shape) -> Any:
    """Elements of cuDNN's workspace: input, weight and output in channels-last; patches of an image
    pad their channels to eight, patches that are cut already are products."""
    channels = x[1]
    padded = -(-channels // _VECTOR_CHANNELS) * _VECTOR_CHANNELS
    if _is_patches(x, weight, out):
        if tuple(weight[2:]) in (tuple(x[2:]), (1, 1)):
            return 0
    elif padded != channels:
        return 0
    return (prod(x) + prod(weight)) // channels * padded + prod(out) + _CONV_MARGIN


def _is_patches(x: Shape, weight: Shape, out: Shape) -> bool:
    """Whether the kernel tiles the planes: as many steps of its size as fit."""
    sides = zip(x[2:], weight[2:], out[2:], strict=True)
    return all(side // kernel == steps for side, kernel, steps in sides)


def conv(t: Engine, x: Tensor, weight: Tensor, bias: Tensor | None, out_shape: Shape) -> Tensor:
    """A convolution, in 16 bits under autocast: saves its input and weight.

    cuDNN turns planes to channels-last inside, so its workspace holds input, weight and output once
    more (allocator histories of an H200, torch 2.11), but not for channels that tensor cores don't
    take; patches (stride = kernel) are products without it.
    """
    bias, weight, x = t.lower_all(bias, weight, x)
    out = t.new(out_shape, x.dtype, "convolution")
    workspace = _conv_workspace(x.shape, weight.shape, out_shape) if len(x.shape) == 4 else 0
    if not isinstance(workspace, int) or workspace:
        t.new((workspace,), x.dtype, "cuDNN convolution (workspace)")
    flops = 2 * prod(out_shape) * prod(weight.shape[1:])
    traffic = grad_bytes(x) + grad_bytes(weight) + grad_bytes(out)
    t.count_matmul(flops, traffic, x.dtype)
    inputs = (x, weight, bias)
    needs = [i is not None and i.requires_grad for i in inputs]
    shapes = [i.shape if i is not None else () for i in inputs]
    dtype = x.dtype

    def backward(g: Tensor) -> tuple[Tensor | None, ...]:
        made = []
        for shape, need in zip(shapes, needs, strict=True):
            if need:
                t.count_matmul(flops, traffic, dtype)
            made.append(t.new(shape, dtype, "convolution (backward)") if need else None)
        return tuple(made)

    return t.record(out, inputs, (x, weight), backward)


def group_norm(t: Engine, x: Tensor, weight: Tensor, bias: Tensor, groups: int = 32) -> Tensor:
    """F.group_norm, an fp32 operation under autocast: saves its input and two statistics. x is
    (N, C, ...)."""
    x, weight, bias = t.upper(x), t.upper(weight), t.upper(bias)
    t.count(2 * grad_bytes(x))
    out = t.new(x.shape, x.dtype, "group_norm")
    mean = t.new((x.shape[0], groups), x.dtype, "group_norm statistics")
    rstd = t.new((x.shape[0], groups), x.dtype, "group_norm statistics")
    inputs, shapes = (x, weight, bias), (x.shape, weight.shape, bias.shape)
    needs = [i.requires_grad for i in inputs]
    dtype = x.dtype

    def backward(g: Tensor) -> tuple[Tensor | None, ...]:
        t.count(3 * prod(shapes[0]) * dtype.itemsize)
        return tuple(
            t.new(shape, dtype, "group_norm (backward)") if need else None
            for shape, need in zip(shapes, needs, strict=True)
        )

    return t.record(out, inputs, (x, weight, mean, rstd), backward)


def sigmoid(t: Engine, x: Tensor) -> Tensor:
    """torch.sigmoid: saves its result."""
    t.count(2 * grad_bytes(x))
    out = t.like(x, x.dtype, "sigmoid")
    return t.record(out, (x,), (out,), lambda g: (t.like(g, g.dtype, "sigmoid (backward)"),))


def activation(t: Engine, name: str, x: Tensor) -> Tensor:
    """ACT2FN[name]: quick_gelu is x * sigmoid(1.702 x), the rest are one kernel that saves x."""
    if name == "quick_gelu":
        return t.mul(x, sigmoid(t, t.scale(x)))
    return t.activation(x, name)


def swish_in_place(t: Engine, x: Tensor) -> Tensor:
    """`x *= torch.sigmoid(x)`: nothing new but the sigmoid, and where a gradient is wanted a clone
    of what is overwritten (VariableType's original_self); saves both."""
    gate = sigmoid(t, x)
    original = t.new(x.shape, x.dtype, "clone (in place)") if t.wants_grad(x) else None
    t.count(3 * grad_bytes(x))
    shape, dtype = x.shape, x.dtype

    def backward(g: Tensor) -> tuple[Tensor, Tensor]:
        other = t.new(shape, dtype, "mul (backward)")
        return t.new(shape, dtype, "mul (backward)"), other

    return t.record(x.view(shape), (x, gate), (original, gate), backward)


def pad_corner(t: Engine, x: Tensor) -> Tensor:
    """F.pad(x, (0, 1, 0, 1)) of (N, C, H, W)."""
    *lead, height, width = x.shape
    out = t.new((*lead, height + 1, width + 1), x.dtype, "pad")
    t.count(2 * grad_bytes(x))
    source = x.shape
    return t.record(out, (x,), (), lambda g: (t.new(source, g.dtype, "pad (backward)"),))


def narrow(t: Engine, x: Tensor, shape: Shape) -> Tensor:
    """x[:, a:b]: a view; its backward fills zeros of the whole."""
    source = x.shape

    def backward(g: Tensor) -> tuple[Tensor]:
        t.count(2 * prod(source) * g.dtype.itemsize, 2)
        return (t.new(source, g.dtype, "slice_backward"),)

    return t.record(x.view(shape), (x,), (), backward)


def rows_apart(t: Engine, x: Tensor) -> Tensor:
    """torch.cat(list(x)) of (N, P, D): one copy, (N·P, D); backward stacks the rows' gradients."""
    source, width = x.shape, x.shape[-1]
    out = t.new((prod(source[:-1]), width), x.dtype, "cat")
    t.count(2 * grad_bytes(x))

    def backward(g: Tensor) -> tuple[Tensor]:
        t.count(2 * prod(source) * g.dtype.itemsize)
        return (t.new(source, g.dtype, "stack (backward)"),)

    return t.record(out, (x,), (), backward)


def gather_rows(t: Engine, x: Tensor, rows: Any) -> Tensor:
    """x[index] over rows: a copy; backward adds into zeros (index_put, sorted by index)."""
    shape, source = (rows, *x.shape[1:]), x.shape
    out = t.new(shape, x.dtype, "index")
    t.count(2 * grad_bytes(out))

    def backward(g: Tensor) -> tuple[Tensor]:
        t.count(3 * grad_bytes(g), 2)
        return (t.new(source, g.dtype, "index (backward)"),)

    return t.record(out, (x,), (), backward)


def unbind_qkv(t: Engine, x: Tensor, shape: Shape) -> list[Tensor]:
    """x.reshape(P, 3, h, d).permute(1, 0, 2, 3).unbind(0): three views; their gradients are
    stacked and laid out again."""
    source, dtype = x.shape, x.dtype
    grads: list[Tensor] = []
    token = Tensor(None, source, dtype)

    def join(_: Tensor) -> tuple[Tensor]:
        t.count(4 * prod(source) * dtype.itemsize, 2)
        stacked = t.new((3, *shape), dtype, "stack (backward)")
        grads.clear()
        whole = t.new(source, dtype, "reshape (backward)")
        del stacked
        return (whole,)

    def collect(g: Tensor) -> tuple[Tensor | None]:
        grads.append(g)
        return (token if len(grads) == 3 else None,)

    base = t.record(x.view(source), (x,), (), join)
    return [t.record(x.view(shape), (base,), (), collect) for _ in range(3)]


def pack_tiles(t: Engine, x: Tensor, shape: Shape, tiles: int) -> Tensor:
    """LLaVA-NeXT's pack_image_features, one image after another: the tiles laid out as one map (a
    copy), a column of separators (cat), the whole image before it (cat). x (N · tiles, P, D);
    shape (N, features, D). Backward undoes it image by image and joins what was split."""
    source, dtype = x.shape, x.dtype
    maps = ((tiles - 1) * source[1], source[2])
    rows = shape[1:]

    def one_image(op: str) -> None:
        laid_out = t.new(maps, dtype, op)
        separated = t.new(rows, dtype, op)
        del laid_out, separated

    one_image("cat (tiles)")
    out = t.new(shape, dtype, "cat (image features)")
    t.count(6 * grad_bytes(out), 4)

    def backward(g: Tensor) -> tuple[Tensor]:
        one_image("cat (tiles, backward)")
        t.count(6 * grad_bytes(g), 6)
        return (t.new(source, g.dtype, "cat (split backward)"),)

    return t.record(out, (x,), (), backward)


def average_pool(t: Engine, x: Tensor, out_shape: Shape) -> Tensor:
    """nn.AvgPool2d of (N, C, H, W): saves its input."""
    out = t.new(out_shape, x.dtype, "avg_pool2d")
    t.count(grad_bytes(x) + grad_bytes(out))
    source = x.shape
    return t.record(out, (x,), (x,), lambda g: (t.new(source, g.dtype, "avg_pool2d (backward)"),))


def placeholder_mask(t: Engine, ids: Tensor) -> Tensor:
    """get_placeholder_mask: input_ids == image_token_id, (B, S, 1)."""
    mask = t.new(ids.shape, BOOL, "eq (placeholders)")
    return mask.view((*ids.shape, 1))


def masked_scatter(t: Engine, x: Tensor, mask: Tensor, source: Tensor) -> Tensor:
    """x.masked_scatter(mask, source): a copy of x; the kernel expands the mask and takes an int64
    prefix sum of it (IndexKernel.cpp). x (B, S, D), mask (B, S, 1), source of any shape."""
    out = t.new(x.shape, x.dtype, "masked_scatter")
    t.count(2 * grad_bytes(x) + 9 * prod(x.shape), 4)
    positions = t.new(x.shape, INT64, "masked_scatter (prefix sum)")
    expanded = t.new(x.shape, BOOL, "masked_scatter (mask)")
    del expanded
    del positions
    needs, shape, count = (x.requires_grad, source.requires_grad), x.shape, source.shape

    def backward(g: Tensor) -> tuple[Tensor | None, Tensor | None]:
        t.count(2 * grad_bytes(g))
        kept = t.new(shape, g.dtype, "masked_fill (backward)") if needs[0] else None
        if not needs[1]:
            return kept, None
        expanded = t.new(shape, BOOL, "masked_scatter (mask, backward)")
        indices = t.new((prod(count), len(shape)), INT64, "masked_scatter (backward)")
        del expanded
        taken = t.new(count, g.dtype, "masked_scatter (backward)")
        del indices
        return kept, taken

    return t.record(out, (x, source), (mask,), backward)


def total(t: Engine, parts: Sequence[Tensor], shape: Shape, op: str) -> Tensor:
    """An fp32 result of `parts` that no gradient is wanted of."""
    t.count(sum(grad_bytes(part) for part in parts))
    return t.new(shape, F32, op)
