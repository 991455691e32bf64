"""The step program of a decoder stack: transformers' modelling code in the same order, on shadow
tensors. What differs between families is read from `DecoderGeometry`.

Shapes: B batch, S sequence, D hidden, h heads, k key-value heads, d head dimension.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from planner.dtypes import F32, INT64
from planner.memory import attention as attention_ops
from planner.memory import layers as nn
from planner.memory import norms, vocabulary
from planner.memory.loaded import Loaded
from planner.memory.ops import Engine
from planner.memory.sizes import decide
from planner.memory.tensor import Tensor
from planner.models.decoder import SLIDING, Attention, DecoderGeometry

Rotary = tuple[Tensor, Tensor]  # cos and sin
Masks = dict[Attention, Tensor | None]


class Decoder:
    """`...Model.forward` from embeddings to the last norm."""

    def __init__(self, t: Engine, loaded: Loaded, geometry: DecoderGeometry, prefix: str) -> None:
        self.t = t
        self.loaded = loaded
        self.g = geometry
        self.prefix = prefix
        self.rows: tuple[Any, Any] = (0, 0)  # batch and sequence
        # Trainer switches use_cache off in the model's config, not in that of the text model inside
        # an image-text model: it fills a cache, and returns it, unless its layers are checkpointed.
        checkpointed = loaded.spec.gradient_checkpointing and t.training
        self.caches = prefix != "model." and not checkpointed
        self.cache: list[Tensor] = []

    def embed(self, ids: Tensor) -> Tensor:
        """embed_tokens, with the hook of enable_input_require_grads under checkpointing."""
        path = f"{self.prefix}embed_tokens"
        with self.t.recorder.scope(path):
            out = vocabulary.embedding(self.t, self.loaded.parameter(path), ids)
            if self.g.embedding_scale:
                out = self.t.scale(out)
            adapter = self.loaded.embedding_adapter(path)
            if adapter is not None:
                scales = 1 + self.g.embedding_scale
                out = vocabulary.lora_embedding(self.t, out, ids, adapter, scales)
        spec = self.loaded.spec
        if spec.gradient_checkpointing and spec.stack == "stock" and not out.requires_grad:
            out.requires_grad = self.t.grad_enabled
        return out

    def layers(self, hidden: Tensor, masks: Masks | None = None) -> Tensor:
        """All decoder layers and the last norm. hidden: (B, S, D); masks: of a family that makes
        its own."""
        t, kinds = self.t, self.loaded.layer_kinds(self.g.layer_types)
        self.rows = hidden.shape[0], hidden.shape[1]
        counted = t.new((hidden.shape[1],), INT64, "arange (positions)")
        _position_ids = t.new(counted.shape, INT64, "add (positions)")
        del counted
        masks = masks or {kind: self._mask(kind, hidden) for kind in dict.fromkeys(kinds)}
        if self.g.rotary_by_layer_type:
            rotary = {kind: self._positions(hidden) for kind in dict.fromkeys(kinds)}
        else:
            rotary = dict.fromkeys(kinds, self._positions(hidden))
        lean = self._lean_layers()
        for index, kind in enumerate(kinds):
            prefix = f"{self.prefix}layers.{index}."
            layer = partial(self.layer, prefix, masks[kind], rotary[kind])
            t.recorder.mark(("forward", index))
            if lean is not None:
                hidden = lean.layer(prefix, hidden, masks[kind] is not None)
            elif self.loaded.spec.gradient_checkpointing:
                hidden = t.checkpoint(layer, hidden)
            else:
                hidden = layer(hidden)
            if hidden.node is not None:
                hidden.node.mark = ("backward", index)
        t.recorder.mark(("forward", len(kinds)))
        return self.norm(f"{self.prefix}norm", hidden)

    def _lean_layers(self) -> Any:
        """The lean stack's layers in training; None for the modelling code's own."""
        if self.loaded.spec.stack != "lean" or not self.t.training:
            return None
        from planner.models.lean_step import LeanLayers  # loaded for lean runs alone

        return LeanLayers(self.t, self.loaded, self.g)

    def layer(self, prefix: str, mask: Tensor | None, rotary: Rotary, hidden: Tensor) -> Tensor:
        """One decoder layer. `_weights`: eager attention hands its scores back, and the layer holds
        them (under the name _) until it returns."""
        t, g = self.t, self.g
        residual = hidden
        if g.swin_norm:
            hidden, _weights = self.attention(prefix, mask, rotary, hidden)
            hidden = self.norm(f"{prefix}input_layernorm", hidden)
            hidden = t.add(residual, hidden)
            residual = hidden
            hidden = self.mlp(prefix, hidden)
            hidden = self.norm(f"{prefix}post_attention_layernorm", hidden)
            return t.add(residual, hidden)
        hidden = self.norm(f"{prefix}input_layernorm", hidden)
        hidden, _weights = self.attention(prefix, mask, rotary, hidden)
        if g.sandwich_norms:
            hidden = self.norm(f"{prefix}post_attention_layernorm", hidden)
        hidden = t.add(residual, hidden, "add (residual)")
        residual = hidden
        name = "pre_feedforward_layernorm" if g.sandwich_norms else "post_attention_layernorm"
        hidden = self.norm(prefix + name, hidden)
        hidden = self.mlp(prefix, hidden)
        if g.sandwich_norms:
            hidden = self.norm(f"{prefix}post_feedforward_layernorm", hidden)
        return t.add(residual, hidden, "add (residual)")

    def norm(self, path: str, hidden: Tensor) -> Tensor:
        """RMSNorm of either kind."""
        weight = self.loaded.parameter(path)
        rule = norms.gemma_rms_norm if self.g.norm == "gemma_rms" else norms.rms_norm
        with self.t.recorder.scope(path):
            return rule(self.t, weight, hidden)

    def mlp(self, prefix: str, x: Tensor) -> Tensor:
        """down(act(gate(x)) * up(x)); Phi-3 fuses gate and up."""
        t, path = self.t, f"{prefix}mlp."
        if self.g.fused_projections:
            both = nn.linear(t, self.loaded.linear(f"{path}gate_up_proj"), x)
            gate, up = t.chunk(both, 2)
            up = self._product(path, up, self._activate(path, gate))
            return nn.linear(t, self.loaded.linear(f"{path}down_proj"), up)
        gate = self._activate(path, nn.linear(t, self.loaded.linear(f"{path}gate_proj"), x))
        up = nn.linear(t, self.loaded.linear(f"{path}up_proj"), x)
        product = self._product(path, gate, up)
        del gate, up
        return nn.linear(t, self.loaded.linear(f"{path}down_proj"), product)

    def _activate(self, path: str, x: Tensor) -> Tensor:
        with self.t.recorder.scope(path + "act_fn"):
            return self.t.activation(x, self.g.hidden_act)

    def _product(self, path: str, a: Tensor, b: Tensor) -> Tensor:
        with self.t.recorder.scope(path.rstrip(".")):
            return self.t.mul(a, b)

    def attention(
        self, prefix: str, mask: Tensor | None, rotary: Rotary, hidden: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """The attention module, with the prompts of a LLaMA-Adapter where it is wrapped: the output
        and, of eager attention, the weights."""
        out, weights = self._attention(prefix, mask, rotary, hidden)
        if f"{prefix}self_attn" in self.loaded.trained:
            from planner.models.adaption_prompt import prompted  # loaded for its runs alone

            path = f"{prefix}self_attn."
            cos, sin = (part.view((1, *part.shape)) for part in rotary)
            out = prompted(self.t, self.loaded, path, self.g, hidden, out,
                           lambda q: self._turned(q, cos, sin))  # fmt: skip
        return out, weights

    def _attention(
        self, prefix: str, mask: Tensor | None, rotary: Rotary, hidden: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Projections, query-key norm, rotary positions, the attention kernel, o_proj: the output
        and, of eager attention, the weights."""
        t, g, path = self.t, self.g, f"{prefix}self_attn."
        batch, length, _ = hidden.shape
        q, k, v = self._project(path, hidden)
        with t.recorder.scope(path.rstrip(".")):
            q, k = self._rotate(q, k, rotary)
            if self.caches:
                k, v = attention_ops.cached(t, k, k), attention_ops.cached(t, v, k)
                self.cache += (k.detach(), v.detach())
            out, weights = attend(
                t, self.loaded.spec.attention, q, k, v, mask, not g.bidirectional,
                g.attention_dropout, g.attn_logit_softcapping,
            )  # fmt: skip
            out = t.reshape(out, (batch, length, g.attention_width))
        return nn.linear(t, self.loaded.linear(f"{path}o_proj"), out), weights

    def _project(self, path: str, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q (B, h, S, d), k and v (B, k, S, d), with the query-key norm where the family has one:
        Qwen 3 between view and transpose, Gemma 3 after them, Chameleon after all projections."""
        t, g = self.t, self.g
        heads = (g.num_attention_heads, g.num_key_value_heads, g.num_key_value_heads)
        names, norms = ("q_proj", "k_proj", "v_proj"), ("q_norm", "k_norm", "")
        if g.qk_norm == "chameleon":
            q, k, v = (nn.linear(t, self.loaded.linear(path + name), hidden) for name in names)
            q = self._grouped_norm(f"{path}q_norm", q, heads[0])
            k = self._grouped_norm(f"{path}k_norm", k, heads[1])
            q, k, v = (self._heads(x, n) for x, n in zip((q, k, v), heads, strict=True))
            return q, k, v
        if g.fused_projections:
            both = nn.linear(t, self.loaded.linear(f"{path}qkv_proj"), hidden)
            parts = [t.slice_last(both, number * g.head_dim) for number in heads]
            q, k, v = (self._heads(x, n) for x, n in zip(parts, heads, strict=True))
            return q, k, v
        early = g.qk_norm == "rms" and g.norm == "rms"
        q, k, v = (
            self._heads(
                nn.linear(t, self.loaded.linear(path + name), hidden), number,
                path + norm if early and norm else "",
            )
            for name, number, norm in zip(names, heads, norms, strict=True)
        )  # fmt: skip
        if g.qk_norm == "rms" and not early:
            q = self.norm(f"{path}q_norm", q)
            k = self.norm(f"{path}k_norm", k)
        return q, k, v

    def _grouped_norm(self, path: str, x: Tensor, heads: int) -> Tensor:
        """ChameleonLayerNorm over each head, with a weight and a bias a head."""
        t = self.t
        batch, length, _ = x.shape
        with t.recorder.scope(path):
            x = t.reshape(x, (batch * length, heads, self.g.head_dim))
            x = norms.layer_norm(t, x)
            return t.add(t.mul(x, self.loaded.parameter(path)), self.loaded.parameter(path, "bias"))

    def _heads(self, x: Tensor, heads: int, norm: str = "") -> Tensor:
        """(B, S, h·d), or Chameleon's (B·S, h, d), to (B, h, S, d)."""
        t = self.t
        batch, length = self.rows
        x = t.alias(x, (batch, length, heads, self.g.head_dim), x.contiguous)
        if norm:
            x = self.norm(norm, x)
        return t.transpose(x, 1, 2)

    def _positions(self, hidden: Tensor) -> Rotary:
        """rotary_emb: cos and sin of (1, S, d) in the hidden states' dtype, computed in fp32."""
        t, length = self.t, hidden.shape[1]
        d = int(self.g.head_dim * self.g.partial_rotary_factor)
        with t.recorder.scope(f"{self.prefix}rotary_emb"):
            as_float = t.new((1, 1, length), F32, "to")
            freqs = t.new((1, d // 2, length), F32, "bmm")
            emb = t.new((1, length, d), F32, "cat")
            cos, sin = (self._scaled(emb.shape, name) for name in ("cos", "sin"))
            del freqs, as_float
            return t.to(cos, hidden.dtype), t.to(sin, hidden.dtype)

    def _scaled(self, shape: tuple[Any, ...], name: str) -> Tensor:
        """cos or sin, times attention_scaling."""
        angles = self.t.new(shape, F32, name)
        scaled = self.t.new(shape, F32, "mul")
        del angles
        return scaled

    def _rotate(self, q: Tensor, k: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor]:
        """apply_rotary_pos_emb: q * cos + rotate_half(q) * sin, and for k. Phi-3 turns the first
        columns of each head and joins the rest again, also where nothing is left."""
        t = self.t
        cos, sin = (part.view((1, *part.shape)) for part in rotary)
        if not self.g.fused_projections:
            q_out = self._turned(q, cos, sin)
            return q_out, self._turned(k, cos, sin)
        width, turning = q.shape[-1], cos.shape[-1]
        halves = [(t.slice_last(x, turning), t.slice_last(x, width - turning)) for x in (q, k)]
        (q_rot, q_pass), (k_rot, k_pass) = halves
        del halves
        q_out = t.cat((self._turned(q_rot, cos, sin), q_pass), q.shape)
        return q_out, t.cat((self._turned(k_rot, cos, sin), k_pass), k.shape)

    def _turned(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return turned(self.t, x, cos, sin)

    def _mask(self, kind: Attention, hidden: Tensor) -> Tensor | None:
        """create_causal_mask or create_sliding_window_causal_mask, where nothing is padded: eager
        attention always has one, sdpa only where the window is shorter than the sequence."""
        batch, length, _ = hidden.shape
        if self.loaded.spec.attention == "flash_attention_2":
            return None
        window = self.g.sliding_window if kind == SLIDING else None
        if self.loaded.spec.attention == "eager":
            from planner.memory.eager_attention import eager_mask  # loaded for eager runs alone

            return eager_mask(self.t, batch, length, hidden.dtype, window is not None)
        if window is None or not decide(length >= window):
            return None
        return attention_ops.bool_mask(self.t, batch, length, window=True)


def attend(
    t: Engine, implementation: attention_ops.Implementation, q: Tensor, k: Tensor, v: Tensor,
    mask: Tensor | None = None, causal: bool = True, dropout: float = 0.0,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """transformers' attention interface: output (B, S, h, d), and weights where eager. The fused
    kernels of the families modelled take no dropout and no soft cap."""
    if implementation == "eager":
        from planner.memory.eager_attention import eager  # loaded for eager runs alone

        return eager(t, q, k, v, mask, dropout if t.training else 0.0, softcap)
    if implementation == "flash_attention_2":
        out = attention_ops.flash_attention_2(t, q, k, v, causal)
    else:
        out = attention_ops.sdpa(t, q, k, v, mask, causal)
    return t.contiguous(t.transpose(out, 1, 2)), None


def turned(t: Engine, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x * cos + rotate_half(x) * sin."""
    scaled = t.mul(x, cos)
    half = x.shape[-1] // 2
    first, second = t.slice_last(x, half), t.slice_last(x, x.shape[-1] - half)
    negated = t.neg(second)
    swapped = t.cat((negated, first), x.shape)
    del negated, first, second
    swapped = t.mul(swapped, sin)
    return t.add(scaled, swapped)


def head_and_loss(
    t: Engine, loaded: Loaded, geometry: DecoderGeometry, hidden: Tensor, labels: Tensor,
    masked_columns: int = 0, path: str = "lm_head",
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """lm_head (at `path`), soft caps, Chameleon's masking of image columns, and the loss: (loss,
    logits)."""
    if loaded.spec.stack == "lean":
        from planner.models.lean_step import lean_loss  # loaded for lean runs alone

        return lean_loss(t, loaded, geometry, hidden, path)
    t.recorder.enter("loss")
    logits = nn.linear(t, loaded.linear(path), hidden)
    with t.recorder.scope("lm_head"):
        if geometry.final_logit_softcapping:
            logits = t.scale(logits, "div")
            logits = t.tanh(logits)
            logits = t.scale(logits)
        if masked_columns:
            logits = vocabulary.mask_columns(t, logits, masked_columns)
    with t.recorder.scope("loss"):
        return vocabulary.causal_lm_loss(t, logits, labels), logits
