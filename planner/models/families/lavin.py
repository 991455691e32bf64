"""LaVIN: a LLaMA and a CLIP tower, both frozen, with mixture-of-modality adapters in each layer, a
projector of a few visual tokens, and a modality token.

The step is `recipes/lavin`'s, on transformers' own two models: modules as its `Lavin` names them.
What trains is the model's own adapter, in fp32 (`method = "lora"` stands for it; the spec's `lora`
is not used); only the language model's linears are quantised, in 4 bits.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from planner.dtypes import BOOL, F32, INT64
from planner.errors import InputError, Problem, UnsupportedError
from planner.memory import layers as nn
from planner.memory import vision as ops
from planner.memory import vocabulary
from planner.memory.loaded import Loaded
from planner.memory.ops import Engine
from planner.memory.step import Batch
from planner.memory.storage import Recorder
from planner.memory.tensor import Tensor
from planner.models.causal import nested_decoder
from planner.models.decoder import FULL, DecoderGeometry, linear, stack_modules
from planner.models.decoder_step import Decoder, head_and_loss
from planner.models.families import llama
from planner.models.mm_adapter import (
    AdapterGeometry,
    adapt,
    adapted_norms,
    first_position,
    read_adapter,
    with_adapters,
)
from planner.models.reading import Reader
from planner.models.towers import TowerGeometry, read_tower, tower_modules
from planner.models.tree import ModelTree, Module
from planner.models.vision_step import Tower
from planner.spec import Lora, RunSpec

AUTO_CLASS = "recipes.lavin.model.Lavin"
ADAPTER = "mixture-of-modality adapters"
LANGUAGE, VISION = "language.model.", "vision."
_LLAMA_NORMS = ("input_layernorm", "post_attention_layernorm")
_CLIP_NORMS = ("layer_norm1", "layer_norm2")
_OWN = ("adapter", "projector")  # components that train


@dataclass(frozen=True, slots=True)
class LavinGeometry:
    """projector_size: width of the visual tokens' MLP; visual_every: a visual token is the class
    token of every this many layers of the tower."""

    text: DecoderGeometry
    vision: TowerGeometry
    adapter: AdapterGeometry
    projector_size: int
    visual_every: int

    @property
    def visual_tokens(self) -> int:
        """Tokens a picture takes in the language model: 6 for ViT-L/14."""
        return self.vision.num_hidden_layers // self.visual_every


def geometry(config: Mapping[str, Any]) -> LavinGeometry:
    """The geometry that the config describes; InputError names every bad key."""
    reader = Reader(config)
    read = LavinGeometry(
        text=nested_decoder(reader.inner("text_config"), {"llama": llama.FAMILY}, "llama"),
        vision=read_tower(reader.inner("vision_config"), "clip_vision_model"),
        adapter=read_adapter(reader),
        projector_size=reader.size("projector_size", 128),
        visual_every=reader.size("visual_every", 4),
    )
    if reader.sound:
        _check_groups(reader, read)
    reader.check()
    return read


def _check_groups(reader: Reader, read: LavinGeometry) -> None:
    if not read.vision.class_token:
        reader.reject("vision_config", "is no CLIP tower: it has no class token")
    groups = read.adapter.groups
    for width in (read.adapter.bottleneck, read.text.hidden_size, read.vision.hidden_size):
        if width % groups:
            reader.reject("groups", f"does not divide {width}", groups)


def modules(geometry: LavinGeometry) -> Iterator[Module]:
    """Modules of `recipes.lavin.model.Lavin`, in torch's order."""
    text, tower, adapter = geometry.text, geometry.vision, geometry.adapter
    yield from with_adapters(
        stack_modules(text, LANGUAGE), adapted_norms(adapter.text, *_LLAMA_NORMS),
        f"{LANGUAGE}layers.", text.hidden_size, adapter,
    )  # fmt: skip
    yield linear("language.lm_head", "lm_head", text.hidden_size, text.vocab_size)
    yield from with_adapters(
        tower_modules(tower, VISION), adapted_norms(adapter.vision, *_CLIP_NORMS),
        f"{VISION}encoder.layers.", tower.hidden_size, adapter,
    )  # fmt: skip
    width, inner = tower.hidden_size, geometry.projector_size
    yield linear("projector.first", "projector", width, inner, bias=True)
    yield linear("projector.second", "projector", inner, text.hidden_size, bias=True)
    # An embedding, but one that no optimizer treats as one: Trainer's rule is not asked here.
    yield Module("modality", "other", "adapter", (("weight", (2, text.hidden_size)),))


def image_tokens(geometry: LavinGeometry, image_size: int | None) -> int:
    """The visual tokens, whatever the size: pictures are stretched to the tower's resolution."""
    return geometry.visual_tokens


image_features = image_tokens


def load(spec: RunSpec, tree: ModelTree) -> Loaded:
    """As `recipes.lavin.build` leaves the model. Raises UnsupportedError for what it refuses."""
    refused = [
        ("method", "'full'", "lora, which trains LaVIN's own adapters", spec.method == "full"),
        ("adapter", "'adaption_prompt'", "lora, which stands for LaVIN's own",
         spec.adapter != "lora"),
        ("lora", "LoRA beside LaVIN's adapters", "its own, without any lora setting",
         spec.lora.__dict__ != Lora.model_construct().__dict__),
        ("quantization", "'int8'", "none, nf4, fp4", spec.quantization == "int8"),
        ("stack", "'lean'", "stock", spec.stack == "lean"),
        ("attention", "'flash_attention_2'", "sdpa, eager: the modality token needs a mask",
         spec.attention == "flash_attention_2"),
    ]  # fmt: skip
    for field, value, allowed, is_refused in refused:
        if is_refused:
            raise UnsupportedError(f"{field}: {value} is not built for LaVIN; allowed: {allowed}")
    trained, plain = _parts(tree)
    return Loaded(spec, tree, frozenset(), plain, trained=trained, own_step=True)


@lru_cache(maxsize=8)
def _parts(tree: ModelTree) -> tuple[frozenset[str], frozenset[str]]:
    """Modules that train, and linears that are never quantised."""
    trained = frozenset(m.path for m in tree.modules if m.component in _OWN)
    plain = frozenset(m.path for m in tree.linears() if m.component != "language_model")
    return trained, plain


def make_batch(geometry: LavinGeometry, spec: RunSpec) -> Batch:
    """What the step sends to the device in its forward, still on the host: ids and labels (N, S-1),
    the modality token being no token of the text; a picture a sample (N, 3, H, W), or none."""
    rows, tower = spec.micro_batch_size, geometry.vision
    if spec.images_per_sample > 1:
        raise InputError(
            Problem("images_per_sample", "LaVIN takes one picture a sample at most",
                    spec.images_per_sample, "0 or 1")
        )  # fmt: skip
    ids = Tensor(None, (rows, spec.sequence_length - 1), INT64)
    size = (rows, tower.num_channels, tower.image_size, tower.image_size)
    pixels = Tensor(None, size, F32) if spec.images_per_sample else None
    return Batch(ids, ids, ids, pixels)


def forward(t: Engine, loaded: Loaded, geometry: LavinGeometry, batch: Batch) -> tuple[Tensor]:
    """`LavinStep.forward(batch).loss`."""
    ids = _sent(t.recorder, batch.ids, "input_ids")
    labels = _sent(t.recorder, batch.labels, "labels")
    pixels = None if batch.pixels is None else _sent(t.recorder, batch.pixels, "pixel_values")
    decoder = LavinDecoder(t, loaded, geometry)
    embedded = _inputs(decoder, ids, pixels)
    mask = _mask(decoder, embedded)
    labels = t.new((ids.shape[0], ids.shape[1] + 1), INT64, "pad (labels)")
    hidden = decoder.layers(embedded, {FULL: mask})
    loss, _logits = head_and_loss(t, loaded, geometry.text, hidden, labels, path="language.lm_head")
    return (loss,)


def _sent(recorder: Recorder, x: Tensor, name: str) -> Tensor:
    with recorder.scope("inputs"):
        return Tensor(recorder.allocate(x.shape, x.dtype, name, "inputs"), x.shape, x.dtype)


class LavinDecoder(Decoder):
    """LlamaModel with adapters behind norms, no key-value cache, no hook on its embeddings."""

    def __init__(self, t: Engine, loaded: Loaded, geometry: LavinGeometry) -> None:
        super().__init__(t, loaded, geometry.text, LANGUAGE)
        self.geometry = geometry
        self.caches = False

    def norm(self, path: str, hidden: Tensor) -> Tensor:
        """A norm, or an AdaptedNorm."""
        if path in self.loaded.tree.by_path:
            return super().norm(path, hidden)
        normed = super().norm(f"{path}.norm", hidden)
        return adapt(self.t, self.loaded, f"{path}.adapter.", self.geometry.adapter, normed)


class LavinTower(Tower):
    """CLIPVisionModel with adapters behind norms; its embeddings want no gradient."""

    def __init__(self, t: Engine, loaded: Loaded, geometry: LavinGeometry) -> None:
        super().__init__(t, loaded, geometry.vision, VISION)
        self.adapter = geometry.adapter

    def class_tokens(self, pixels: Tensor, every: int) -> list[Tensor]:
        """The class token after every `every` layers, as views of the layers' outputs."""
        hidden = self.embed(pixels)
        hidden = self._norm("pre_layrnorm", hidden)
        tokens = []
        for index in range(self.g.num_hidden_layers):
            hidden = self._checkpointed(index, hidden)
            if (index + 1) % every == 0:
                tokens.append(first_position(self.t, hidden))
        return tokens

    def _patches(self, path: str, pixels: Tensor, shape: tuple[int, ...]) -> Tensor:
        with self.t.recorder.scope(path):
            return ops.conv(self.t, pixels, self._weight(path), None, shape)

    def _norm_at(self, path: str, x: Tensor) -> Tensor:
        if path in self.loaded.tree.by_path:
            return super()._norm_at(path, x)
        normed = super()._norm_at(f"{path}.norm", x)
        return adapt(self.t, self.loaded, f"{path}.adapter.", self.adapter, normed)


def _inputs(decoder: LavinDecoder, ids: Tensor, pixels: Tensor | None) -> Tensor:
    """Lavin.inputs without the mask: embeddings (N, S, d), visual tokens and modality included."""
    t, loaded, shape = decoder.t, decoder.loaded, ids.shape
    places = t.new(shape, BOOL, "eq (placeholders)")
    pictured = t.new((shape[0],), BOOL, "any")
    path = f"{LANGUAGE}embed_tokens"
    with t.recorder.scope(path):
        h = vocabulary.embedding(t, loaded.parameter(path), t.new(shape, INT64, "clamp"))
    if pixels is not None:
        visual = _visual_tokens(decoder, pixels)
        h = ops.masked_scatter(t, h, places.view((*shape, 1)), t.to(visual, h.dtype))
    with t.recorder.scope("modality"):
        rows = t.new(pictured.shape, INT64, "to")
        modality = vocabulary.embedding(t, loaded.parameter("modality"), rows)
    modality = t.alias(modality, (shape[0], 1, h.shape[-1]), True)
    return t.cat((t.to(modality, h.dtype), h), (shape[0], shape[1] + 1, h.shape[-1]))


def _visual_tokens(decoder: LavinDecoder, pixels: Tensor) -> Tensor:
    """Lavin.visual_tokens: (P, 3, H, W) -> (P, K, d)."""
    t, loaded, geometry = decoder.t, decoder.loaded, decoder.geometry
    tokens = LavinTower(t, loaded, geometry).class_tokens(pixels, geometry.visual_every)
    images, width = tokens[0].shape
    stacked = _stack(t, tokens, (images, len(tokens), width))
    hidden = nn.linear(t, loaded.linear("projector.first"), stacked)
    del stacked
    with t.recorder.scope("projector"):
        hidden = t.activation(hidden, "silu")
    return nn.linear(t, loaded.linear("projector.second"), hidden)


def _stack(t: Engine, parts: list[Tensor], shape: tuple[int, ...]) -> Tensor:
    """torch.stack(parts, dim=1): a copy; backward gives views."""
    out = t.new(shape, parts[0].dtype, "stack")
    shapes = [part.shape for part in parts]
    return t.record(out, parts, (), lambda g: tuple(g.view(s, False) for s in shapes))


def _mask(decoder: LavinDecoder, h: Tensor) -> Tensor:
    """Lavin.mask: (1, 1, S, S) in the dtype that attention computes in."""
    t, size = decoder.t, h.shape[1]
    dtype = t.autocast_dtype or h.dtype
    with t.recorder.scope("mask"):
        full = t.new((size, size), dtype, "full")
        mask = t.new((size, size), dtype, "triu")
        del full
    return mask.view((1, 1, size, size))
