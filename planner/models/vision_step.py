"""The step program of CLIP and SigLIP towers, and of the models that put one before a decoder:
transformers' modelling code in the same order.

Shapes: N images, P positions, D width, h heads.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

from planner.dtypes import INT64
from planner.errors import UnsupportedError
from planner.memory import layers as nn
from planner.memory import norms, vocabulary
from planner.memory import vision as ops
from planner.memory.loaded import Loaded
from planner.memory.ops import Engine
from planner.memory.step import Batch
from planner.memory.storage import Recorder
from planner.memory.tensor import Tensor
from planner.models.decoder_step import Decoder, attend, head_and_loss
from planner.models.images import image_input
from planner.models.towers import TowerGeometry
from planner.spec import RunSpec


class Tower:
    """CLIPVisionModel.forward or SiglipVisionModel.forward."""

    def __init__(self, t: Engine, loaded: Loaded, geometry: TowerGeometry, prefix: str) -> None:
        self.t = t
        self.loaded = loaded
        self.g = geometry
        self.prefix = prefix

    def embed(self, pixels: Tensor) -> Tensor:
        """Patches (and CLIP's class token) with their positions. pixels: (N, 3, H, W)."""
        t, g, path = self.t, self.g, f"{self.prefix}embeddings"
        images, grid = pixels.shape[0], g.image_size // g.patch_size
        with t.recorder.scope(path):
            pixels = t.to(pixels, self._weight(f"{path}.patch_embedding").dtype)
        patches = self._patches(
            f"{path}.patch_embedding", pixels, (images, g.hidden_size, grid, grid)
        )
        del pixels
        with t.recorder.scope(path):
            hidden = t.transpose(t.alias(patches, (images, g.hidden_size, g.patches), True), 1, 2)
            if g.class_token:
                patches = hidden
                token = self.loaded.parameter(path, "class_embedding")
                token = token.view((images, 1, g.hidden_size)) if not token.requires_grad else (
                    _expanded(t, token, images)
                )  # fmt: skip
                hidden = t.cat((token, hidden), (images, g.positions, g.hidden_size))
        positions = Tensor(None, (1, g.positions), INT64)
        position = f"{path}.position_embedding"
        with t.recorder.scope(position):
            rows = vocabulary.embedding(t, self._weight(position), positions)
        with t.recorder.scope(path):
            return t.add(hidden, rows)

    def _patches(self, path: str, pixels: Tensor, shape: tuple[int, ...]) -> Tensor:
        names = dict(self.loaded.tree.by_path[path].shapes)
        bias = self.loaded.parameter(path, "bias") if "bias" in names else None
        with self.t.recorder.scope(path):
            out = ops.conv(self.t, pixels, self._weight(path), bias, shape)
        # enable_input_require_grads finds the tower's input embeddings too.
        if self.loaded.spec.gradient_checkpointing and not out.requires_grad:
            out.requires_grad = self.t.grad_enabled
        return out

    def hidden_states(self, pixels: Tensor) -> list[Tensor]:
        """output_hidden_states=True: the input of the first layer and the output of each."""
        hidden = self.embed(pixels)
        if self.g.class_token:
            hidden = self._norm("pre_layrnorm", hidden)
        states = [hidden]
        for index in range(self.g.num_hidden_layers):
            hidden = self._checkpointed(index, hidden)
            states.append(hidden)
        return states

    def last_hidden_state(self, pixels: Tensor) -> Tensor:
        """SiglipVisionModel.forward without a head: post_layernorm of the last layer's output."""
        if self.g.vision_use_head:
            raise UnsupportedError("vision_config.vision_use_head: the head has no step program")
        embeds = hidden = self.embed(pixels)
        for index in range(self.g.num_hidden_layers):
            hidden = self._checkpointed(index, hidden)
        last = self._norm("post_layernorm", hidden)
        del embeds
        return last

    def pooled(self, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
        """post_layernorm: of CLIP's class token, of all SigLIP positions (and then its head)."""
        t, g = self.t, self.g
        if g.class_token:
            first = ops.narrow(t, hidden, (hidden.shape[0], g.hidden_size))
            return hidden, self._norm("post_layernorm", first)
        return self._norm("post_layernorm", hidden), None

    def _checkpointed(self, index: int, hidden: Tensor) -> Tensor:
        layer = partial(self._layer, f"{self.prefix}encoder.layers.{index}.")
        if self.loaded.spec.gradient_checkpointing and self.t.training:
            return self.t.checkpoint(layer, hidden)
        return layer(hidden)

    def _layer(self, prefix: str, hidden: Tensor) -> Tensor:
        """CLIPEncoderLayer.forward, SiglipEncoderLayer.forward."""
        t, residual = self.t, hidden
        hidden = self._norm_at(f"{prefix}layer_norm1", hidden)
        hidden, _weights = self._attention(f"{prefix}self_attn.", hidden)
        hidden = t.add(residual, hidden, "add (residual)")
        residual = hidden
        hidden = self._norm_at(f"{prefix}layer_norm2", hidden)
        hidden = two_layers(t, self.loaded, f"{prefix}mlp.", hidden, self.g.hidden_act)
        return t.add(residual, hidden, "add (residual)")

    def _attention(self, path: str, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
        t, g = self.t, self.g
        images, length, width = hidden.shape
        q, k, v = self._project(path, hidden)
        with t.recorder.scope(path.rstrip(".")):
            out, weights = attend(
                t, self.loaded.spec.attention, q, k, v, None, False, g.attention_dropout
            )
            out = t.reshape(out, (images, length, width))
        return nn.linear(t, self.loaded.linear(f"{path}out_proj"), out), weights

    def _project(self, path: str, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """CLIP projects all three, then views; SigLIP views each as it is made."""
        t = self.t
        names = ("q_proj", "k_proj", "v_proj")
        if not self.g.class_token:
            q, k, v = (
                self._heads(nn.linear(t, self.loaded.linear(path + name), hidden)) for name in names
            )
            return q, k, v
        q, k, v = (nn.linear(t, self.loaded.linear(path + name), hidden) for name in names)
        return self._heads(q), self._heads(k), self._heads(v)

    def _heads(self, x: Tensor) -> Tensor:
        images, length, _ = x.shape
        shape = (images, length, self.g.num_attention_heads, self.g.head_dim)
        return self.t.transpose(self.t.alias(x, shape, True), 1, 2)

    def _weight(self, path: str) -> Tensor:
        weight: Tensor = self.loaded.parameter(path)
        return weight

    def _norm(self, name: str, x: Tensor) -> Tensor:
        return self._norm_at(self.prefix + name, x)

    def _norm_at(self, path: str, x: Tensor) -> Tensor:
        weight, bias = self.loaded.parameter(path), self.loaded.parameter(path, "bias")
        with self.t.recorder.scope(path):
            return norms.layer_norm(self.t, x, weight, bias)


def two_layers(t: Engine, loaded: Loaded, prefix: str, x: Tensor, act: str) -> Tensor:
    """CLIPMLP, SiglipMLP, Qwen2-VL's VisionMlp: fc2(act(fc1(x)))."""
    hidden = nn.linear(t, loaded.linear(f"{prefix}fc1"), x)
    with t.recorder.scope(f"{prefix}act"):
        hidden = ops.activation(t, act, hidden)
    return nn.linear(t, loaded.linear(f"{prefix}fc2"), hidden)


def _expanded(t: Engine, token: Tensor, images: int) -> Tensor:
    """class_embedding.expand(N, 1, D): a view; backward sums."""
    shape, source = (images, 1, token.shape[-1]), token.shape
    out = token.view(shape)
    return t.record(out, (token,), (), lambda g: (t.new(source, g.dtype, "sum (expand)"),))


def join(t: Engine, embeds: Tensor, ids: Tensor, features: Tensor) -> Tensor:
    """masked_scatter of the image features at the placeholders of the text embeddings."""
    mask = ops.placeholder_mask(t, ids)
    return ops.masked_scatter(t, embeds, mask, features)


class HasTower(Protocol):
    """A geometry with a tower of square images."""

    @property
    def vision(self) -> TowerGeometry: ...


def tower_pixels(recorder: Recorder, geometry: HasTower, spec: RunSpec) -> Tensor:
    """pixel_values: (B · images, 3, H, W) fp32."""
    tower = geometry.vision
    count = spec.micro_batch_size * spec.images_per_sample
    return image_input(recorder, (count, tower.num_channels, tower.image_size, tower.image_size))


def image_text_forward(
    decoder: Decoder, batch: Batch, features_of: Callable[[Tensor], Tensor]
) -> tuple[Any, ...]:
    """`...ForConditionalGeneration.forward` where an image's features take the place of its tokens:
    loss, logits, the cache, image_hidden_states. `features_of` is get_image_features."""
    t = decoder.t
    embeds = decoder.embed(batch.ids)
    features = None
    if batch.pixels is not None:
        features = t.to(features_of(batch.pixels), embeds.dtype)
        embeds = join(t, embeds, batch.ids, features)
    hidden = decoder.layers(embeds)
    del embeds
    loss, logits = head_and_loss(t, decoder.loaded, decoder.g, hidden, batch.labels)
    return loss, logits, decoder.cache, features
