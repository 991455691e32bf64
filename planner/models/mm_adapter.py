"""LaVIN's mixture-of-modality adapter: its modules, and its forward on shadow tensors.

Mirrors `recipes/lavin/adapters.py` statement by statement. Shapes: N samples, S positions, d the
layer's width, r the bottleneck, g groups.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

from planner.memory import layers as nn
from planner.memory.eager_attention import softmax
from planner.memory.loaded import Loaded
from planner.memory.ops import Engine
from planner.memory.tensor import Tensor
from planner.memory.work import grad_bytes
from planner.models.decoder import linear
from planner.models.reading import Reader
from planner.models.tree import Module

Where = Literal["attention", "mlp", "both", "none"]
_UP = 2  # the paths up that the router mixes


@dataclass(frozen=True, slots=True)
class AdapterGeometry:
    """Of every adapter of a model. text, vision: before which halves of a layer they stand."""

    bottleneck: int
    groups: int
    dropout: float
    text: Where
    vision: Where


def read_adapter(reader: Reader) -> AdapterGeometry:
    """The adapter's keys of config.json, the published ones by default."""
    return AdapterGeometry(
        bottleneck=reader.size("bottleneck", 8),
        groups=reader.size("groups", 2),
        dropout=reader.number("dropout", 0.1, high=1.0),
        text=_where(reader, "text_adapters"),
        vision=_where(reader, "vision_adapters"),
    )


def _where(reader: Reader, key: str) -> Where:
    value = reader.text(key, "attention")
    if value not in get_args(Where):
        reader.reject(key, "is not a placement", value, ", ".join(get_args(Where)))
        return "attention"
    return value  # type: ignore[return-value]


def adapted_norms(where: Where, attention: str, mlp: str) -> tuple[str, ...]:
    """Names of the norms whose outputs pass through an adapter."""
    return {"attention": (attention,), "mlp": (mlp,), "both": (attention, mlp), "none": ()}[where]


def with_adapters(
    modules: Iterator[Module], names: tuple[str, ...], layers: str, width: int, g: AdapterGeometry
) -> Iterator[Module]:
    """`modules` where each norm of `names` under the path `layers` is an AdaptedNorm."""
    for module in modules:
        inside = module.path.startswith(layers) and module.path.rpartition(".")[2] in names
        if not inside:
            yield module
            continue
        yield module._replace(path=f"{module.path}.norm")
        yield from adapter_modules(f"{module.path}.adapter.", width, g)


def adapter_modules(prefix: str, width: int, g: AdapterGeometry) -> Iterator[Module]:
    """MixtureOfModalityAdapter's modules, in torch's order."""
    yield linear(f"{prefix}down", "adapter", width, g.bottleneck, bias=True)
    grouped = (("weight", (g.groups, width // g.groups, g.bottleneck // g.groups)),
               ("bias", (width,)))  # fmt: skip
    for index in range(_UP):
        yield Module(f"{prefix}up.{index}", "other", "adapter", grouped)
    yield linear(f"{prefix}router.linear", "adapter", width, _UP, bias=True)


def adapt(t: Engine, loaded: Loaded, prefix: str, g: AdapterGeometry, x: Tensor) -> Tensor:
    """MixtureOfModalityAdapter.forward: x (N, S, d) -> x + w0 B(h) + w1 D(h)."""
    with t.recorder.scope(f"{prefix}down"):
        h = _linear(t, loaded, f"{prefix}down", x)
    with t.recorder.scope(f"{prefix}dropout"):
        h = t.dropout(h, g.dropout)
    weights = _route(t, loaded, f"{prefix}router", x)
    with t.recorder.scope(prefix.rstrip(".")):
        scaled = t.scale(weights)
        del weights
        w = t.to(scaled, h.dtype)
        del scaled
        w0, w1 = t.slice_last(w, 1), t.slice_last(w, 1)
        up = _up(t, loaded, f"{prefix}up.0", h)
        first = t.mul(w0, up)
        del up
        up = _up(t, loaded, f"{prefix}up.1", h)
        second = t.mul(w1, up)
        del up
        both = t.add(first, second)
        del first, second
        return t.add(x, both)


def _linear(t: Engine, loaded: Loaded, path: str, x: Tensor) -> Tensor:
    return nn.matmul(t, x, loaded.parameter(path), loaded.parameter(path, "bias"))


def _up(t: Engine, loaded: Loaded, path: str, h: Tensor) -> Tensor:
    """GroupedLinear.forward."""
    with t.recorder.scope(path):
        dense = _block_diagonal(t, loaded.parameter(path))
        return nn.matmul(t, h, dense, loaded.parameter(path, "bias"))


def _block_diagonal(t: Engine, weight: Tensor) -> Tensor:
    """torch.block_diag(*weight): zeros with the slices copied in; its backward narrows, and
    iterating's stacks."""
    groups, rows, columns = weight.shape
    dense = t.new((groups * rows, groups * columns), weight.dtype, "block_diag")
    t.count(2 * grad_bytes(dense), 1 + groups)
    shape, dtype = weight.shape, weight.dtype

    def backward(g: Tensor) -> tuple[Tensor]:
        t.count(2 * grad_bytes(g))
        return (t.new(shape, dtype, "stack (backward)"),)

    return t.record(dense, (weight,), (), backward)


def _route(t: Engine, loaded: Loaded, path: str, x: Tensor) -> Tensor:
    """Router.forward: (N, 1, 2) in fp32 from the first position of each sample."""
    with t.recorder.scope(path):
        first = first_position(t, x)
        logits = _linear(t, loaded, f"{path}.linear", first)
        cooled = t.scale(logits, "div")
        del logits, first
        weights = softmax(t, cooled)
        return t.alias(weights, (weights.shape[0], 1, weights.shape[1]), True)


def first_position(t: Engine, x: Tensor) -> Tensor:
    """x[:, 0] of (N, S, d): a view; its backward fills zeros of the whole."""
    source = x.shape

    def backward(g: Tensor) -> tuple[Tensor]:
        t.count(2 * grad_bytes(g), 2)
        return (t.new(source, g.dtype, "select (backward)"),)

    return t.record(x.view((source[0], source[2]), False), (x,), (), backward)
