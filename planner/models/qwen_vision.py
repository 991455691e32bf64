"""The step program of the towers of Qwen2-VL and Qwen2.5-VL, and of their decoder's positions.

All images of a batch lie in one row of patches; attention is per image, or per window of 2.5.
Shapes: P patches of all images, D width, h heads, d head dimension.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Protocol

from planner.dtypes import F32
from planner.memory import attention as attention_ops
from planner.memory import layers as nn
from planner.memory import norms
from planner.memory import vision as ops
from planner.memory.loaded import Loaded
from planner.memory.ops import Engine
from planner.memory.tensor import Tensor
from planner.models.decoder_step import Decoder, Rotary, turned
from planner.models.vision_step import two_layers


class PatchShape(Protocol):
    """What of the tower's geometry decides its work."""

    @property
    def depth(self) -> int: ...
    @property
    def hidden_size(self) -> int: ...
    @property
    def num_attention_heads(self) -> int: ...
    @property
    def spatial_merge_size(self) -> int: ...
    @property
    def patch_size(self) -> int: ...
    @property
    def hidden_act(self) -> str: ...
    @property
    def rms(self) -> bool: ...
    @property
    def window_size(self) -> int | None: ...
    @property
    def full_attention_blocks(self) -> tuple[int, ...]: ...


class PatchTower:
    """`...VisionTransformerPretrainedModel.forward`: the merged patches, (P / merge², D_text)."""

    def __init__(
        self, t: Engine, loaded: Loaded, geometry: PatchShape, prefix: str, images: Any,
        grid: tuple[int, int],
    ) -> None:  # fmt: skip
        self.t = t
        self.loaded = loaded
        self.g = geometry
        self.prefix = prefix
        self.images = images
        self.patches = grid[0] * grid[1]  # of one image
        edge = geometry.window_size or 0
        self.window = (edge // geometry.patch_size) ** 2

    def __call__(self, pixels: Tensor) -> Tensor:
        t, g = self.t, self.g
        hidden = self._embed(pixels)
        if g.window_size:
            hidden = ops.gather_rows(t, hidden, hidden.shape[0])
        rotary = self._positions(pixels.shape[0])
        for index in range(g.depth):
            length = self.patches
            if g.window_size and index not in g.full_attention_blocks:
                length = min(self.window, self.patches)
            block = partial(self._block, f"{self.prefix}blocks.{index}.", rotary, length)
            if self.loaded.spec.gradient_checkpointing and t.training:
                hidden = t.checkpoint(block, hidden)
            else:
                hidden = block(hidden)
        merged = self._merge(hidden)
        if g.window_size:
            merged = ops.gather_rows(t, merged, merged.shape[0])
        return merged

    def _embed(self, pixels: Tensor) -> Tensor:
        """PatchEmbed: a Conv3d over each patch; the hook of enable_input_require_grads is here."""
        t, path = self.t, f"{self.prefix}patch_embed.proj"
        weight = self.loaded.parameter(path)
        with t.recorder.scope(path):
            pixels = t.to(pixels, weight.dtype)
            shape = (pixels.shape[0], self.g.hidden_size)
            out = ops.conv(t, pixels, weight, None, shape)
        if self.loaded.spec.gradient_checkpointing and not out.requires_grad:
            out.requires_grad = t.grad_enabled
        return out

    def _positions(self, patches: Any) -> Rotary:
        """Qwen2VLVisionRotaryEmbedding: cos and sin, (P, d) fp32; 2.5 reorders both."""
        t, d = self.t, self.g.hidden_size // self.g.num_attention_heads
        with t.recorder.scope(f"{self.prefix}rotary_pos_emb"):
            freqs = t.new((patches, 2, d // 4), F32, "mul (frequencies)")
            cos, sin = (t.new(freqs.shape, F32, name) for name in ("cos", "sin"))
            del freqs
            tables = []
            for part in (cos, sin):
                half = t.new((patches, d // 2), F32, "cat")
                tables.append(t.new((patches, d), F32, "cat"))
                del part, half
            del cos, sin
            if self.g.window_size:
                tables = [ops.gather_rows(t, table, patches) for table in tables]
        return tables[0], tables[1]

    def _block(self, prefix: str, rotary: Rotary, length: int, hidden: Tensor) -> Tensor:
        t = self.t
        attended = self._attention(
            f"{prefix}attn.", self._norm(f"{prefix}norm1", hidden), rotary, length
        )
        hidden = t.add(hidden, attended, "add (residual)")
        del attended
        return t.add(hidden, self._mlp(f"{prefix}mlp.", self._norm(f"{prefix}norm2", hidden)))

    def _mlp(self, prefix: str, x: Tensor) -> Tensor:
        t = self.t
        if self.g.rms:
            return nn.gated_mlp(t, self.loaded, prefix, x, self.g.hidden_act)
        return two_layers(t, self.loaded, prefix, x, self.g.hidden_act)

    def _attention(self, path: str, hidden: Tensor, rotary: Rotary, length: int) -> Tensor:
        t, heads = self.t, self.g.num_attention_heads
        patches, width = hidden.shape
        d = width // heads
        qkv = nn.linear(t, self.loaded.linear(f"{path}qkv"), hidden)
        with t.recorder.scope(path.rstrip(".")):
            q, k, v = ops.unbind_qkv(t, qkv, (patches, heads, d))
            del qkv
            q, k = self._rotate(q, k, rotary)
            q, k, v = (t.transpose(x, 0, 1) for x in (q, k, v))
            q, k, v = (t.alias(x, (1, heads, patches, d), False, reshapes=False) for x in (q, k, v))
            out = self._attend(q, k, v, length)
            out = t.alias(out, (patches, width), True)
        return nn.linear(t, self.loaded.linear(f"{path}proj"), out)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, length: int) -> Tensor:
        t = self.t
        if self.loaded.spec.attention == "flash_attention_2":
            out = attention_ops.flash_attention_2(t, q, k, v, causal=False)
            return t.transpose(out, 1, 2)
        if self.loaded.spec.attention == "eager":
            from planner.memory.eager_attention import eager_pieces  # loaded for eager runs alone

            return eager_pieces(t, q, k, v, length)
        return attention_ops.flash_pieces(t, q, k, v, length)

    def _rotate(self, q: Tensor, k: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor]:
        """apply_rotary_pos_emb_vision: in fp32."""
        t, source = self.t, q.dtype
        q, k = t.to(q, F32), t.to(k, F32)
        cos, sin = (table.view((table.shape[0], 1, table.shape[1])) for table in rotary)
        q_out = turned(t, q, cos, sin)
        k_out = turned(t, k, cos, sin)
        q_out = t.to(q_out, source)
        return q_out, t.to(k_out, source)

    def _norm(self, path: str, x: Tensor) -> Tensor:
        with self.t.recorder.scope(path):
            if self.g.rms:
                return norms.rms_norm(self.t, self.loaded.parameter(path), x)
            weight, bias = self.loaded.parameter(path), self.loaded.parameter(path, "bias")
            return norms.layer_norm(self.t, x, weight, bias)

    def _merge(self, hidden: Tensor) -> Tensor:
        """PatchMerger."""
        t, path = self.t, f"{self.prefix}merger."
        group = self.g.spatial_merge_size**2
        shape = (hidden.shape[0] // group, self.g.hidden_size * group)
        merged = t.alias(self._norm(f"{path}ln_q", hidden), shape, True)
        merged = nn.linear(t, self.loaded.linear(f"{path}mlp.0"), merged)
        with t.recorder.scope(f"{path}mlp.1"):
            merged = t.activation(merged, "gelu")
        return nn.linear(t, self.loaded.linear(f"{path}mlp.2"), merged)


class QwenVlDecoder(Decoder):
    """The decoder of Qwen2-VL: three position grids, projections before views."""

    def _project(self, path: str, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        t, g = self.t, self.g
        q, k, v = (
            nn.linear(t, self.loaded.linear(path + name), hidden)
            for name in ("q_proj", "k_proj", "v_proj")
        )
        return (
            self._heads(q, g.num_attention_heads),
            self._heads(k, g.num_key_value_heads),
            self._heads(v, g.num_key_value_heads),
        )

    def _positions(self, hidden: Tensor) -> Rotary:
        """Qwen2VLRotaryEmbedding: cos and sin, (B, S, d)."""
        t, d = self.t, self.g.head_dim
        batch, length, _ = hidden.shape
        with t.recorder.scope(f"{self.prefix}rotary_emb"):
            inverse = t.new((3, batch, d // 2, 1), F32, "expand")
            positions = t.new((3, batch, 1, length), F32, "to")
            freqs = t.new((3, batch, d // 2, length), F32, "bmm")
            tables = []
            for name in ("cos", "sin"):
                raw = t.new(freqs.shape, F32, name)
                tables.append(t.new(freqs.shape, F32, "mul"))
                del raw
            for index in (1, 0):
                half = t.new((batch, length, d // 2), F32, "cat")
                tables[index] = t.new((batch, length, d), F32, "cat")
                del half
            del inverse, positions, freqs
            return t.to(tables[0], hidden.dtype), t.to(tables[1], hidden.dtype)

    def _rotate(self, q: Tensor, k: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor]:
        cos, sin = (x.view((x.shape[0], 1, *x.shape[1:])) for x in rotary)
        q_out = self._turned(q, cos, sin)
        return q_out, self._turned(k, cos, sin)
