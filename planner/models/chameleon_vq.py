"""The step program of Chameleon's image tokenizer: ChameleonVQVAE.encode, in the order and with the
lifetimes of modeling_chameleon.py. Its parameters train in full fine-tuning only by name: codes are
an argmin, so no gradient reaches them, but what a gradient would need is held until it is dropped.
"""

from __future__ import annotations

from typing import Any, Protocol

from planner.dtypes import INT64
from planner.memory import vision as ops
from planner.memory.eager_attention import bmm, softmax
from planner.memory.loaded import Loaded
from planner.memory.ops import Engine
from planner.memory.tensor import Tensor


class VqShape(Protocol):
    """What of the tokenizer's geometry decides its work."""

    @property
    def embed_dim(self) -> int: ...
    @property
    def num_embeddings(self) -> int: ...
    @property
    def num_res_blocks(self) -> int: ...
    @property
    def channel_multiplier(self) -> tuple[int, ...]: ...


class VqEncoder:
    """ChameleonVQVAE.encode up to the codes. Images (N, 3, R, R)."""

    def __init__(self, t: Engine, loaded: Loaded, vq: VqShape, prefix: str) -> None:
        self.t = t
        self.loaded = loaded
        self.vq = vq
        self.prefix = prefix

    def encode(self, pixels: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Ids of the codebook entries, (N · codes,) int64, and the rest of the output: what holds
        the graph as long as it lives."""
        hidden = self._encoder(pixels)
        projected = self._conv("quant_conv", hidden)
        with self.t.recorder.scope(f"{self.prefix}quantize"):
            indices, quantized = self._quantize(projected)
        return indices, (hidden, quantized)

    def _encoder(self, pixels: Tensor) -> Tensor:
        """ChameleonVQVAEEncoder.forward: every level's maps stay in a list to its end."""
        t, levels, tree = self.t, len(self.vq.channel_multiplier), self.loaded.tree.by_path
        held = [self._conv("encoder.conv_in", pixels)]
        for level in range(levels):
            down = f"encoder.down.{level}."
            for block in range(self.vq.num_res_blocks):
                state = self._residual(f"{down}block.{block}.", held[-1])
                if f"{self.prefix}{down}attn.{block}.q" in tree:
                    state = self._attention(f"{down}attn.{block}.", state)
                held.append(state)
            if level < levels - 1:
                held.append(self._downsample(f"{down}downsample.conv", held[-1]))
        last = held[-1]
        last = self._residual("encoder.mid.block_1.", last)
        if f"{self.prefix}encoder.mid.attn_1.q" in tree:
            last = self._attention("encoder.mid.attn_1.", last)
        last = self._residual("encoder.mid.block_2.", last)
        last = self._norm("encoder.norm_out", last)
        last = ops.swish_in_place(t, last)
        return self._conv("encoder.conv_out", last)

    def _residual(self, prefix: str, hidden: Tensor) -> Tensor:
        """ChameleonVQVAEEncoderResnetBlock.forward."""
        t, residual = self.t, hidden
        hidden = self._norm(f"{prefix}norm1", hidden)
        with t.recorder.scope(self.prefix + prefix.rstrip(".")):
            hidden = ops.swish_in_place(t, hidden)
        hidden = self._conv(f"{prefix}conv1", hidden)
        hidden = self._norm(f"{prefix}norm2", hidden)
        with t.recorder.scope(self.prefix + prefix.rstrip(".")):
            hidden = ops.swish_in_place(t, hidden)
        hidden = self._conv(f"{prefix}conv2", hidden)
        if f"{self.prefix}{prefix}nin_shortcut" in self.loaded.tree.by_path:
            residual = self._conv(f"{prefix}nin_shortcut", residual)
        with t.recorder.scope(self.prefix + prefix.rstrip(".")):
            return t.add(residual, hidden, "add (residual)")

    def _attention(self, prefix: str, hidden: Tensor) -> Tensor:
        """ChameleonVQVAEEncoderAttnBlock.forward: over all positions of the map."""
        t, residual = self.t, hidden
        hidden = self._norm(f"{prefix}norm", hidden)
        q, k, v = (self._conv(prefix + name, hidden) for name in "qkv")
        images, channels, height, width = q.shape
        flat = (images, channels, height * width)
        with t.recorder.scope(self.prefix + prefix.rstrip(".")):
            q = t.alias(q, (images, height * width, channels), True)  # bmm reads it transposed
            weights = bmm(t, t.lower(q), t.lower(t.alias(k, flat, True)))
            weights = t.scale(weights)
            weights = softmax(t, weights)
            out = bmm(t, t.lower(t.alias(v, flat, True)), t.lower(weights))
            out = t.alias(out, (images, channels, height, width), True)
        out = self._conv(f"{prefix}proj_out", out)
        with t.recorder.scope(self.prefix + prefix.rstrip(".")):
            return t.add(residual, out, "add (residual)")

    def _quantize(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """ChameleonVQVAEVectorQuantizer.forward: distances to every code, in fp32."""
        t, codebook = self.t, self.loaded.parameter(f"{self.prefix}quantize.embedding")
        images, width, height, columns = hidden.shape
        rows, codes = images * height * columns, self.vq.num_embeddings
        hidden = t.clone(t.alias(hidden, (images, height, columns, width), False), "contiguous")
        flat = t.alias(hidden, (rows, width), True)
        distances = self._distances(flat, codebook, rows, codes)
        indices = t.new((rows,), INT64, "argmin")
        quantized = self._look_up(codebook, indices, hidden)
        del distances
        return indices, quantized

    def _distances(self, flat: Tensor, codebook: Tensor, rows: Any, codes: int) -> Tensor:
        t = self.t
        own = self._row_sums(flat, (rows, 1))
        theirs = self._row_sums(codebook, (codes,))
        sums = t.new((rows, codes), own.dtype, "add (distances)")
        del own, theirs
        left, right = t.lower(flat), t.lower(codebook)
        product = t.new((rows, codes), left.dtype, "bmm")
        t.count_matmul(2 * rows * codes * flat.shape[-1], 6 * rows * codes, left.dtype)
        del left, right
        doubled = t.new((rows, codes), product.dtype, "mul (distances)")
        del product
        return ops.total(t, (sums, doubled), (rows, codes), "sub (distances)")

    def _row_sums(self, x: Tensor, shape: tuple[Any, ...]) -> Tensor:
        t = self.t
        wide = t.upper(x)
        squares = t.like(wide, wide.dtype, "pow")
        del wide
        return ops.total(t, (squares,), shape, "sum")

    def _look_up(self, codebook: Tensor, indices: Tensor, hidden: Tensor) -> Tensor:
        """The codes' vectors, the codebook loss and the straight-through copy."""
        t = self.t
        found = t.new(hidden.shape, codebook.dtype, "embedding")
        for _ in range(2):
            difference = t.new(hidden.shape, found.dtype, "sub (codebook loss)")
            wide = t.upper(difference)
            squares = t.like(wide, wide.dtype, "pow")
            del difference, wide, squares
        difference = t.new(hidden.shape, found.dtype, "sub")
        passed = t.new(hidden.shape, found.dtype, "add")
        del difference, found
        return t.clone(passed, "contiguous")

    def _downsample(self, path: str, hidden: Tensor) -> Tensor:
        with self.t.recorder.scope(self.prefix + path.rpartition(".")[0]):
            hidden = ops.pad_corner(self.t, hidden)
        return self._conv(path, hidden, stride=2)

    def _norm(self, path: str, x: Tensor) -> Tensor:
        path = self.prefix + path
        weight, bias = self.loaded.parameter(path), self.loaded.parameter(path, "bias")
        with self.t.recorder.scope(path):
            return ops.group_norm(self.t, x, weight, bias)

    def _conv(self, path: str, x: Tensor, stride: int = 1) -> Tensor:
        path = self.prefix + path
        weight, bias = self.loaded.parameter(path), self.loaded.parameter(path, "bias")
        height, width = (edge // stride for edge in x.shape[2:])
        with self.t.recorder.scope(path):
            return ops.conv(self.t, x, weight, bias, (x.shape[0], weight.shape[0], height, width))
