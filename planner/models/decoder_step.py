"""The step program of a decoder stack: transformers' modelling code in the same order, on shadow
tensors. What differs between families is read from `DecoderGeometry`.

Shapes: B batch, S sequence, D hidden, h heads, k key-value heads, d head dimension.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from planner.dtypes import DType
from planner.memory import layers as nn
from planner.memory.loaded import Loaded
from planner.memory.ops import F32, Engine
from planner.memory.step import Batch
from planner.memory.tensor import Tensor
from planner.models.decoder import DecoderGeometry

INT64, BOOL = DType.INT64, DType.BOOL
Rotary = tuple[Tensor, Tensor]  # cos and sin


class Decoder:
    """`...Model.forward` from embeddings to the last norm."""

    def __init__(self, t: Engine, loaded: Loaded, geometry: DecoderGeometry, prefix: str) -> None:
        self.t = t
        self.loaded = loaded
        self.g = geometry
        self.prefix = prefix
        self.mask: Tensor | None = None

    def embed(self, ids: Tensor) -> Tensor:
        """embed_tokens, with the hook of enable_input_require_grads under checkpointing."""
        path = f"{self.prefix}embed_tokens"
        with self.t.recorder.scope(path):
            out = nn.embedding(self.t, self.loaded.parameter(path), ids)
            if self.g.embedding_scale:
                out = self.t.scale(out)
        if self.loaded.spec.gradient_checkpointing and not out.requires_grad:
            out.requires_grad = self.t.grad_enabled
        return out

    def layers(self, hidden: Tensor) -> Tensor:
        """All decoder layers and the last norm. hidden: (B, S, D)."""
        t = self.t
        rotary = self._positions(hidden)
        for index in range(self.g.num_hidden_layers):
            prefix = f"{self.prefix}layers.{index}."
            if self.loaded.spec.gradient_checkpointing:
                hidden = t.checkpoint(partial(self.layer, prefix, rotary), hidden)
            else:
                hidden = self.layer(prefix, rotary, hidden)
        return self.norm(f"{self.prefix}norm", hidden)

    def layer(self, prefix: str, rotary: Rotary, hidden: Tensor) -> Tensor:
        """One decoder layer."""
        t, g = self.t, self.g
        residual = hidden
        if g.swin_norm:
            hidden = self.attention(prefix, rotary, hidden)
            hidden = self.norm(f"{prefix}input_layernorm", hidden)
            hidden = t.add(residual, hidden)
            residual = hidden
            hidden = self.mlp(prefix, hidden)
            hidden = self.norm(f"{prefix}post_attention_layernorm", hidden)
            return t.add(residual, hidden)
        hidden = self.norm(f"{prefix}input_layernorm", hidden)
        hidden = self.attention(prefix, rotary, hidden)
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
        rule = nn.gemma_rms_norm if self.g.norm == "gemma_rms" else nn.rms_norm
        with self.t.recorder.scope(path):
            return rule(self.t, weight, hidden)

    def mlp(self, prefix: str, x: Tensor) -> Tensor:
        """down(act(gate(x)) * up(x)); Phi-3 fuses gate and up."""
        t, path = self.t, f"{prefix}mlp."
        if self.g.fused_projections:
            both = nn.linear(t, self.loaded.linear(f"{path}gate_up_proj"), x)
            gate = t.slice_last(both, self.g.intermediate_size)
            up = t.slice_last(both, self.g.intermediate_size)
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

    def attention(self, prefix: str, rotary: Rotary, hidden: Tensor) -> Tensor:
        """Projections, query-key norm, rotary positions, the attention kernel, o_proj."""
        t, g, path = self.t, self.g, f"{prefix}self_attn."
        batch, length, _ = hidden.shape
        q, k, v = self._project(path, hidden)
        with t.recorder.scope(path.rstrip(".")):
            q = self._heads(path, "q_norm", q, batch, length, g.num_attention_heads)
            k = self._heads(path, "k_norm", k, batch, length, g.num_key_value_heads)
            v = self._heads(path, "", v, batch, length, g.num_key_value_heads)
            q, k = self._rotate(q, k, rotary)
            out = self._attend(q, k, v)
            out = t.contiguous(t.transpose(out, 1, 2))
            out = t.reshape(out, (batch, length, g.attention_width))
        return nn.linear(t, self.loaded.linear(f"{path}o_proj"), out)

    def _project(self, path: str, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        t, g = self.t, self.g
        if g.fused_projections:
            both = nn.linear(t, self.loaded.linear(f"{path}qkv_proj"), hidden)
            widths = (g.attention_width, g.key_value_width, g.key_value_width)
            q, k, v = (t.slice_last(both, width) for width in widths)
            return q, k, v
        q, k, v = (
            nn.linear(t, self.loaded.linear(f"{path}{name}"), hidden)
            for name in ("q_proj", "k_proj", "v_proj")
        )
        return q, k, v

    def _heads(
        self, path: str, norm: str, x: Tensor, batch: Any, length: Any, heads: int
    ) -> Tensor:
        """(B, S, h·d) -> (B, h, S, d), with the query-key norm where the family has one."""
        t, g = self.t, self.g
        shape = (batch, length, heads, g.head_dim)
        if g.qk_norm == "chameleon" and norm:
            flat = t.reshape(x, (batch * length, heads, g.head_dim))
            weight = self.loaded.parameter(path + norm)
            bias = self.loaded.parameter(path + norm, "bias")
            flat = nn.layer_norm(t, flat)
            flat = t.add(t.mul(flat, weight), bias)
            return t.transpose(t.reshape(flat, shape), 1, 2)
        x = t.alias(x, shape, x.contiguous)
        if g.qk_norm == "rms" and norm:
            rule = nn.gemma_rms_norm if g.norm == "gemma_rms" else nn.rms_norm
            x = rule(t, self.loaded.parameter(path + norm), x)
        return t.transpose(x, 1, 2)

    def _positions(self, hidden: Tensor) -> Rotary:
        """rotary_emb: cos and sin of (1, S, d) in the hidden states' dtype, computed in fp32."""
        t, d, length = self.t, self.g.head_dim, hidden.shape[1]
        with t.recorder.scope(f"{self.prefix}rotary_emb"):
            position = t.new((1, length), INT64, "arange")
            as_float = t.new((1, 1, length), F32, "to")
            freqs = t.new((1, d // 2, length), F32, "bmm")
            emb = t.new((1, length, d), F32, "cat")
            raw_cos, raw_sin = t.new(emb.shape, F32, "cos"), t.new(emb.shape, F32, "sin")
            cos, sin = t.new(emb.shape, F32, "mul"), t.new(emb.shape, F32, "mul")
            del raw_cos, raw_sin, freqs, as_float, position
            return t.to(cos, hidden.dtype), t.to(sin, hidden.dtype)

    def _rotate(self, q: Tensor, k: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor]:
        """apply_rotary_pos_emb: q * cos + rotate_half(q) * sin, and for k."""
        cos, sin = (part.view((1, *part.shape)) for part in rotary)
        q_out = self._rotated(q, cos, sin)
        k_out = self._rotated(k, cos, sin)
        return q_out, k_out

    def _rotated(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        t = self.t
        scaled = t.mul(x, cos)
        half = x.shape[-1] // 2
        first, second = t.slice_last(x, half), t.slice_last(x, x.shape[-1] - half)
        negated = t.neg(second)
        turned = t.cat((negated, first), x.shape)
        del negated, first, second
        turned = t.mul(turned, sin)
        return t.add(scaled, turned)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return nn.sdpa_flash(self.t, q, k, v)


def causal_forward(
    t: Engine, loaded: Loaded, geometry: DecoderGeometry, batch: Batch
) -> tuple[Tensor, Tensor]:
    """`...ForCausalLM.forward` of a text-only model: (loss, logits)."""
    decoder = Decoder(t, loaded, geometry, "model.")
    embeds = decoder.embed(batch.ids)
    hidden = decoder.layers(embeds)
    del embeds  # `inputs_embeds` lives until the backbone's forward returns
    return head_and_loss(t, loaded, geometry, hidden, batch.labels)


def head_and_loss(
    t: Engine, loaded: Loaded, geometry: DecoderGeometry, hidden: Tensor, labels: Tensor,
    masked_columns: int = 0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """lm_head, soft caps, Chameleon's masking of image columns, and the loss: (loss, logits)."""
    t.recorder.enter("loss")
    logits = nn.linear(t, loaded.linear("lm_head"), hidden)
    with t.recorder.scope("lm_head"):
        if geometry.final_logit_softcapping:
            logits = t.scale(logits, "div")
            logits = t.tanh(logits)
            logits = t.scale(logits)
        if masked_columns:
            logits = nn.mask_columns(t, logits, masked_columns)
    with t.recorder.scope("loss"):
        return nn.causal_lm_loss(t, logits, labels), logits
