"""One file a model family: what its config.json says, its modules as torch names them, and how
many tokens an image takes. `FAMILIES` maps a config's model_type to its family, imported on use."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib import import_module
from typing import Any, Protocol, cast

from planner.errors import UnsupportedError, nearest_name
from planner.models.decoder import DecoderGeometry
from planner.models.tree import Module


class Geometry(Protocol):
    """What all geometries share: the decoder's numbers."""

    @property
    def text(self) -> DecoderGeometry: ...


class Family(Protocol):
    """The interface of a family: of its file, or, of a decoder alone, of the `CausalLM` that the
    file names FAMILY.

    AUTO_CLASS: the transformers class whose `from_config` builds the model that is trained.
    geometry: raises InputError naming every missing or absurd key. image_tokens: positions of the
    sequence that one square image of `image_size` pixels takes (None: the size that the model's
    processor makes of any image), start and end marks included; image_features: those among them
    that hold features of the image, and whose labels are masked.

    A family whose step is a recipe of this project may also have `load` (spec, tree -> Loaded) and
    `make_batch` (geometry, spec -> Batch), which stand for the stock stack's.
    """

    AUTO_CLASS: str

    def geometry(self, config: Mapping[str, Any]) -> Any: ...
    def modules(self, geometry: Any) -> Iterable[Module]: ...
    def image_tokens(self, geometry: Any, image_size: int | None) -> int: ...
    def image_features(self, geometry: Any, image_size: int | None) -> int: ...


FAMILIES = {
    "chameleon": "chameleon",
    "llama": "llama",
    "mistral": "mistral",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gemma3": "gemma3",
    "gemma3_text": "gemma3_text",
    "phi3": "phi3",
    "llava": "llava",
    "llava_next": "llava_next",
    "qwen2_vl": "qwen2_vl",
    "qwen2_5_vl": "qwen2_5_vl",
    "paligemma": "paligemma",
    "lavin": "lavin",
}


def family_of(model_type: str) -> Family:
    """The family that reads configs of `model_type`; UnsupportedError names what is known."""
    if model_type not in FAMILIES:
        near = nearest_name(model_type, FAMILIES)
        raise UnsupportedError(
            f"config.model_type: {model_type!r} is not a family that is modelled; known: "
            f"{', '.join(FAMILIES)}{f'; did you mean {near!r}?' if near else ''}; "
            "`vramwise probe --dry` or `vramwise fit --exact` can take any model of transformers"
        )
    module = import_module(f"planner.models.families.{FAMILIES[model_type]}")
    return cast(Family, getattr(module, "FAMILY", module))
