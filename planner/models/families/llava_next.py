"""LLaVA 1.6 (LLaVA-NeXT): LLaVA with high resolution. An image is seen whole and in tiles, and
takes tokens by its size and shape."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from planner.memory import vision as vision_ops
from planner.memory.loaded import Loaded
from planner.memory.ops import Engine
from planner.memory.step import Batch
from planner.memory.storage import Recorder
from planner.memory.tensor import Tensor
from planner.models.decoder import DecoderGeometry
from planner.models.decoder_step import Decoder
from planner.models.families import llava
from planner.models.images import image_input, needed_size
from planner.models.reading import Reader
from planner.models.tree import Module
from planner.models.vision_step import image_text_forward
from planner.spec import RunSpec

AUTO_CLASS = "AutoModelForImageTextToText"
_PINPOINTS = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))


@dataclass(frozen=True, slots=True)
class LlavaNextGeometry:
    """grid_pinpoints: (height, width) of the canvases that an image may be laid on."""

    base: llava.LlavaGeometry
    grid_pinpoints: tuple[tuple[int, int], ...]

    @property
    def text(self) -> DecoderGeometry:
        return self.base.text


def geometry(config: Mapping[str, Any]) -> LlavaNextGeometry:
    """The geometry that config.json describes; InputError names every bad key."""
    reader = Reader(config)
    base = llava.read_llava(reader, tie_follows_text=False)
    read = LlavaNextGeometry(base, _pinpoints(reader))
    reader.check()
    return read


def _pinpoints(reader: Reader) -> tuple[tuple[int, int], ...]:
    value = reader.raw("image_grid_pinpoints", [list(point) for point in _PINPOINTS])
    good = isinstance(value, list) and bool(value)
    if not good or any(
        not isinstance(point, list)
        or len(point) != 2
        or any(type(edge) is not int for edge in point)
        for point in value
    ):
        reader.reject("image_grid_pinpoints", "is not a list of [height, width]", value)
        return _PINPOINTS
    return tuple((height, width) for height, width in value)


def modules(geometry: LlavaNextGeometry) -> Iterator[Module]:
    """Modules of `LlavaNextForConditionalGeneration`: LLaVA's after the row separator."""
    newline = (("image_newline", (geometry.text.hidden_size,)),)
    yield Module("model", "other", "projector", newline)
    yield from llava.modules(geometry.base)


def image_tokens(geometry: LlavaNextGeometry, image_size: int | None) -> int:
    """The whole image, its tiles without their padding, and a separator a row of patches.

    As `LlavaNextProcessor._get_number_of_features` counts, for a square image; `class_feature`
    adds the class token.
    """
    edge = needed_size("llava_next", image_size)
    vision = geometry.base.vision
    patches = vision.image_size // vision.patch_size
    height, width = _best_canvas(edge, geometry.grid_pinpoints)
    rows, columns = (patches * (side // vision.image_size) for side in (height, width))
    if rows < columns:  # square image on a wider canvas: columns are padding
        columns -= (columns - rows) // 2 * 2
    else:
        rows -= (rows - columns) // 2 * 2
    return vision.patches + geometry.base.class_feature + rows * columns + rows


image_features = image_tokens


def tiles(geometry: LlavaNextGeometry, image_size: int | None) -> int:
    """Images the tower sees for one image: the whole, and the tiles of its canvas."""
    edge = needed_size("llava_next", image_size)
    tile = geometry.base.vision.image_size
    height, width = _best_canvas(edge, geometry.grid_pinpoints)
    return 1 + (height // tile) * (width // tile)


def _best_canvas(edge: int, canvases: tuple[tuple[int, int], ...]) -> tuple[int, int]:
    """`select_best_resolution`: most of the image kept, then least of the canvas wasted."""

    def fit(canvas: tuple[int, int]) -> tuple[int, int]:
        side = int(edge * min(canvas[0] / edge, canvas[1] / edge))
        kept = min(side * side, edge * edge)
        return kept, -(canvas[0] * canvas[1] - kept)

    return max(canvases, key=fit)


def pixels(recorder: Recorder, geometry: LlavaNextGeometry, spec: RunSpec) -> Tensor:
    """pixel_values: (B · images, tiles, 3, H, W) fp32."""
    tower = geometry.base.vision
    count = spec.micro_batch_size * spec.images_per_sample
    shape = (tower.num_channels, tower.image_size, tower.image_size)
    return image_input(recorder, (count, tiles(geometry, spec.image_size), *shape))


def forward(
    t: Engine, loaded: Loaded, geometry: LlavaNextGeometry, batch: Batch
) -> tuple[Any, ...]:
    """`LlavaNextForConditionalGeneration.forward`: loss, logits, the cache, image_hidden_states."""

    def features_of(images: Tensor) -> Tensor:
        packed = _image_features(t, loaded, geometry, images)
        return vision_ops.rows_apart(t, packed)

    decoder = Decoder(t, loaded, geometry.text, "model.language_model.")
    decoder.caches = False  # this class hands its own use_cache down
    return image_text_forward(decoder, batch, features_of)


def _image_features(
    t: Engine, loaded: Loaded, geometry: LlavaNextGeometry, images: Tensor
) -> Tensor:
    """get_image_features: the tower over all tiles at once, then pack_image_features for each
    image, (N, features, D)."""
    count, parts, *shape = images.shape
    with t.recorder.scope("model"):
        every = t.new((count * parts, *shape), images.dtype, "cat (tiles)")
    packed = (count, image_features(geometry, loaded.spec.image_size), geometry.text.hidden_size)

    def pack(projected: Tensor) -> Tensor:
        with t.recorder.scope("model"):
            return vision_ops.pack_tiles(t, projected, packed, parts)

    return llava.image_features_of(t, loaded, geometry.base, every, pack)
