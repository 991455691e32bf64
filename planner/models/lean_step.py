"""The lean stack's step (recipes/lean.py, layers.py, fused.py, loss.py) on shadow tensors.

A decoder layer is compiled: between kernels stay what the fused linears read again in backward, the
attention kernel's inputs and results, and the residual; norms, rotary positions and the activation
are fused into what is around them, and a gradient takes the place of what it was made from. A
checkpointed layer keeps its input alone. The loss meets a chunk of logits at a time.
"""

from __future__ import annotations

from math import prod
from typing import Any

from planner.dtypes import F32, INT64, DType
from planner.errors import UnsupportedError
from planner.memory.attention import flash_buffers
from planner.memory.layers import Linear, dequantized
from planner.memory.loaded import Loaded
from planner.memory.ops import Engine
from planner.memory.tensor import Tensor
from planner.memory.vocabulary import minimum

CHUNK_BYTES = 1 << 27  # recipes.loss.CHUNK_BYTES
_SPLIT_GRADIENT = 32  # at most so many partial sums of an adapter's gradient (recipes.kernels)


class LeanLayers:
    """The decoder layers of a model. `geometry`: its DecoderGeometry."""

    def __init__(self, t: Engine, loaded: Loaded, geometry: Any) -> None:
        if loaded.spec.quantization == "int8":
            raise UnsupportedError("quantization: int8 is not modelled for the lean stack; try nf4")
        self.t, self.loaded, self.g = t, loaded, geometry
        fused = geometry.fused_projections
        self.qkv: tuple[str, ...] = ("qkv",) if fused else ("q", "k", "v")
        self.gate_up: tuple[str, ...] = ("gate_up",) if fused else ("gate", "up")
        self.sandwiched = geometry.sandwich_norms  # norms after attention and MLP keep their inputs
        self.split = not (fused or self.sandwiched)  # recipes.layers.PLAIN_LAYERS
        self.dtype = DType(loaded.spec.weights_dtype)

    def layer(self, prefix: str, hidden: Tensor, masked: bool) -> Tensor:
        """(B, S, D) -> (B, S, D). masked: attention is given a mask (a window within the sequence),
        which each layer makes of the boolean one."""
        t, names = self.t, _names(self.g)
        linears = {n: self.loaded.linear(prefix + path) for n, path in names.items()}
        leaves = [x for state in linears.values() for x in _leaves(state) if x.requires_grad]
        reached = t.grad_enabled and (hidden.requires_grad or bool(leaves))
        checkpoint = reached and self.loaded.spec.gradient_checkpointing
        with t.no_grad():
            held = self._body(linears, hidden, masked, keep=reached and not checkpoint)
            out = self._mlp_output(linears, held, keep=reached and not checkpoint)
        if not reached:
            return out
        self._drop_unread(linears, held)
        saved = (hidden,) if checkpoint else (hidden, *held.values())
        del held
        shape = hidden.shape

        def backward(grad: Tensor) -> tuple[Tensor | None, ...]:
            recomputed = None
            if checkpoint:
                recomputed = self._body(linears, Tensor(None, shape, self.dtype), masked, keep=True)
                if not self.split:  # recomputed whole, and held while its backward runs
                    recomputed["output"] = self._mlp_output(linears, recomputed, keep=True)
                returned = {"product": recomputed["product"]} if self.split else {}
                self._drop_unread(linears, recomputed)
                recomputed |= returned  # the split layer's body hands it over
                del returned
            gradients = self._backward(linears, shape, recomputed)
            del recomputed
            made = t.new(shape, self.dtype, "layer (input gradient)")
            del grad
            return made, *gradients

        return t.record(out, (hidden, *leaves), saved, backward)

    def _body(
        self, linears: dict[str, Linear], hidden: Tensor, masked: bool, keep: bool
    ) -> dict[str, Tensor]:
        """Everything up to the last linear's input; all that backward reads where `keep`."""
        t, g, (batch, length, _) = self.t, self.g, hidden.shape
        kept: dict[str, Tensor] = {"x1": self._new(hidden.shape, "norm")}
        projected = {n: self._linear(linears[n], kept["x1"]) for n in self.qkv}
        if not keep:
            del kept["x1"]
        if "qkv" in projected:  # q, k and v are views of it
            projected = dict.fromkeys(("q", "k", "v"), projected["qkv"])
        heads = {"q": g.num_attention_heads, "k": g.num_key_value_heads, "v": g.num_key_value_heads}
        turned = {}
        for name, count in heads.items():
            shape = (batch, count, length, g.head_dim)
            if name == "v":
                turned[name] = projected.pop(name)
                continue
            turned[name] = self._new(shape, "rotary")
            if keep and g.qk_norm != "none":
                kept[f"{name} before its norm"] = projected.pop(name)
            else:
                del projected[name]
        mask = self._new((batch, 1, length, length), "mask") if masked else None
        out = self._new((batch, g.num_attention_heads, length, g.head_dim), "attention")
        statistics = t.new((batch, g.num_attention_heads, length), F32, "attention log-sum-exp")
        flops = 4 * batch * g.num_attention_heads * length * length * g.head_dim // 2
        t.count_matmul(flops, 4 * prod(out.shape) * 2, self.dtype)
        if keep:
            kept |= {**turned, "attention": out, "log-sum-exp": statistics}
            kept |= {"mask": mask} if mask is not None else {}
        del turned, statistics, mask
        residual = self._linear(linears["o"], out)  # the residual is added in place
        del out
        if self.sandwiched:
            attended, residual = residual, self._new(hidden.shape, "residual")
            kept |= {"attended": attended} if keep else {}
            del attended
        x2 = self._new(hidden.shape, "norm")
        inner = {name: self._linear(linears[name], x2) for name in self.gate_up}
        kept |= {"residual": residual, "x2": x2, **inner} if keep else {"residual": residual}
        if keep or "gate" not in inner:
            width = linears["down"].in_features
            kept["product"] = self._new((batch, length, width), "activation * up")
        else:
            kept["product"] = inner["gate"]  # written over it
        return kept

    def _drop_unread(self, linears: dict[str, Linear], held: dict[str, Tensor]) -> None:
        """A linear's input is read again in backward by its adapter, or its weight's gradient."""
        if self.sandwiched:  # made again from what the norm after attention is given
            held.pop("residual", None)
        readers = {"x1": self.qkv, "x2": self.gate_up, "product": ("down",)}
        for name, paths in readers.items():
            trained = any(x.requires_grad for path in paths for x in _leaves(linears[path]))
            if name in held and not trained:
                del held[name]

    def _mlp_output(
        self, linears: dict[str, Linear], held: dict[str, Tensor], keep: bool
    ) -> Tensor:
        """The last linear, the norm after it where there is one, the residual in place."""
        out = self._linear(linears["down"], held["product"])
        if not self.sandwiched:
            return out
        if keep:
            held["mlp output"] = out
        return self._new(out.shape, "residual")

    def _backward(
        self, linears: dict[str, Linear], shape: Any, held: dict[str, Tensor] | None
    ) -> list[Tensor]:
        """The linears' backward, last first; the adapters' gradients in the order of the leaves."""
        t = self.t
        found: dict[str, list[Tensor]] = {}
        inner: Tensor | None = self._linear_backward(linears["down"], shape, found, "down")
        held = {} if held is None else held
        if not self.split:
            held.pop("product", None)
        # The activation's gradients: one is new, for which gate is given up; one takes up's place.
        # Of a fused projection there is one.
        width = linears[self.gate_up[0]].out_features
        fresh: Tensor | None = self._new((*shape[:2], width), "activation (backward)")
        held.pop(self.gate_up[0], None)
        if not self.split:  # else whoever asked for the body's gradients holds it
            inner = None
        for name in reversed(self.gate_up):
            self._linear_backward(linears[name], shape, found, name)
            fresh = None
        del inner, fresh
        for name in ("product", *self.gate_up, "x2", "residual", "mlp output"):
            held.pop(name, None)
        attended = self._linear_backward(linears["o"], shape, found, "o")
        g, (batch, length, _) = self.g, shape
        shapes = [
            (batch, n, length, g.head_dim)
            for n in (g.num_attention_heads, g.num_key_value_heads, g.num_key_value_heads)
        ]
        grads = [self._new(s, "attention (backward)") for s in shapes]
        expanded = [(prod(shapes[0]), self.dtype)] * 2 if shapes[0] != shapes[1] else []
        rows = batch * g.num_attention_heads
        workspace = flash_buffers(t, rows, length, g.head_dim, expanded)
        t.count_matmul(
            10 * rows * length * length * g.head_dim // 2, 8 * prod(shapes[0]), self.dtype
        )
        del workspace, attended
        for name in self.qkv:
            self._linear_backward(linears[name], shape, found, name)
        del grads
        return [grad for name in linears for grad in found.get(name, [])]

    def _linear(self, state: Linear, x: Tensor) -> Tensor:
        """recipes.fused.adapted_linear: the weight dequantised for the product, a rank-wide row."""
        t, rows = self.t, x.shape[:2] if len(x.shape) == 3 else (x.shape[0], x.shape[2])
        weight = dequantized(t, state, self.dtype) if state.quantization == "4bit" else None
        out = self._new((*rows, state.out_features), "mm")
        flops = 2 * prod(rows) * state.in_features * state.out_features
        t.count_matmul(flops, self._traffic(state, prod(rows)), self.dtype)
        del weight
        if state.adapter is not None:  # A and B cast, the row made, summed and cast, addmm
            traffic = prod(rows) * (state.in_features + 2 * state.out_features)
            t.count(traffic * self.dtype.itemsize, 6)
        return out

    def _linear_backward(
        self, state: Linear, shape: Any, found: dict[str, list[Tensor]], name: str
    ) -> Tensor:
        """adapted_linear_backward: the input's gradient, the adapter's summed in parts."""
        t, rows = self.t, shape[0] * shape[1]
        weight = dequantized(t, state, self.dtype) if state.quantization == "4bit" else None
        out = self._new((shape[0], shape[1], state.in_features), "mm (backward)")
        flops = 2 * rows * state.in_features * state.out_features
        t.count_matmul(flops, self._traffic(state, rows), self.dtype)
        del weight
        if state.adapter is None:
            if any(leaf.requires_grad for leaf in _leaves(state)):  # trained whole
                t.count_matmul(flops, self._traffic(state, rows), self.dtype)
                found[name] = [
                    t.new(leaf.shape, leaf.dtype, "mm (weight gradient)") for leaf in _leaves(state)
                ]
            return out
        a, b = state.adapter.a, state.adapter.b
        parts = t.new((minimum(rows // 256 + 1, _SPLIT_GRADIENT), *a.shape), F32, "adapter (parts)")
        del parts
        found[name] = [t.new(leaf.shape, leaf.dtype, "adapter gradient") for leaf in (a, b)]
        # A and B cast; du, scaled; B's gradient, cast, scaled; A's in parts, summed, cast; dx
        t.count(rows * (state.in_features + state.out_features) * 4, 11)
        return out

    def _new(self, shape: Any, op: str) -> Tensor:
        out = self.t.new(shape, self.dtype, op)
        self.t.count(2 * prod(shape) * self.dtype.itemsize)
        return out

    def _traffic(self, state: Linear, rows: Any) -> Any:
        n, k = state.out_features, state.in_features
        return self.dtype.itemsize * (rows * (n + k) + n * k)


def lean_loss(
    t: Engine, loaded: Loaded, geometry: Any, hidden: Tensor, path: str
) -> tuple[Tensor, None]:
    """recipes.loss: the head and the loss, chunk by chunk; one chunk is run, all are counted."""
    t.recorder.enter("loss")
    state, dtype = loaded.linear(path), hidden.dtype
    batch, length, width = hidden.shape
    predicted = batch * (length - 1 - loaded.masked_labels)
    vocab = state.out_features
    rows = minimum(predicted, max(1, CHUNK_BYTES // (vocab * dtype.itemsize)))
    leaves = [x for x in _leaves(state) if x.requires_grad]
    with t.recorder.scope(path):
        places = [t.new((predicted,), INT64, "positions, targets") for _ in range(2)]
        grads = [t.new(hidden.shape, dtype, "hidden gradient")] if hidden.requires_grad else []
        grads += [t.new(leaf.shape, F32, "head gradient") for leaf in leaves]
        chunk = t.new((rows, width), dtype, "chunk of rows")
        logits = t.new((rows, vocab), dtype, "chunk of logits", "logits")
        gradient = t.new((rows, vocab), dtype, "chunk of logits (gradient)", "logits")
        del logits
        back = t.new((rows, width), dtype, "chunk of rows (gradient)")
        del back, gradient, chunk
        flops = 2 * predicted * vocab * width
        for _ in range(1 + hidden.requires_grad):
            t.count_matmul(flops, 2 * (predicted * (vocab + width) + vocab * width), dtype)
        loss = t.new((), F32, "loss")
        del places
    kept, hidden_reached = list(grads), hidden.requires_grad
    del grads

    def backward(_: Tensor) -> tuple[Tensor | None, ...]:
        made = tuple(kept) if hidden_reached else (None, *kept)
        kept.clear()  # they were made in the forward; whoever takes them holds them
        return made

    return t.record(loss, (hidden, *leaves), tuple(kept), backward), None


def _names(g: Any) -> dict[str, str]:
    qkv = ("qkv",) if g.fused_projections else ("q", "k", "v")
    gate_up = ("gate_up",) if g.fused_projections else ("gate", "up")
    attention = {n: f"self_attn.{n}_proj" for n in (*qkv, "o")}
    return {**attention, **{n: f"mlp.{n}_proj" for n in (*gate_up, "down")}}


def _leaves(state: Linear) -> list[Tensor]:
    if state.adapter is not None:
        return [state.adapter.a, state.adapter.b]
    return [x for x in (state.weight, state.bias) if x is not None and x.requires_grad]
