"""Families that are a decoder and nothing else, `...ForCausalLM`.

A family file states the model type, transformers' defaults, and in `refine` where its decoder
differs. Everything else is here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from planner.errors import InputError, Problem
from planner.models.decoder import (
    DecoderGeometry,
    Defaults,
    head_module,
    read_decoder,
    stack_modules,
)
from planner.models.decoder_step import Decoder, head_and_loss
from planner.models.reading import Reader
from planner.models.tree import Module

if TYPE_CHECKING:
    from planner.memory.loaded import Loaded
    from planner.memory.ops import Engine
    from planner.memory.step import Batch
    from planner.memory.tensor import Tensor


class CausalLM:
    """A text-only family; see `planner.models.families.Family` for what each method is for."""

    AUTO_CLASS = "AutoModelForCausalLM"
    model_type: str
    defaults: Defaults

    def refine(self, reader: Reader, read: DecoderGeometry) -> DecoderGeometry:
        """`read`, the keys that all decoders have, with those of this family."""
        raise NotImplementedError

    def decoder(self, reader: Reader, nested: bool = False) -> DecoderGeometry:
        """The decoder's geometry; `nested` in a larger config, sizes may be left out."""
        return self.refine(reader, read_decoder(reader, self.model_type, self.defaults, nested))

    def geometry(self, config: Mapping[str, Any]) -> DecoderGeometry:
        """The geometry that config.json describes; InputError names every bad key."""
        reader = Reader(config)
        read = self.decoder(reader)
        reader.check()
        return read

    def modules(self, geometry: DecoderGeometry) -> Iterator[Module]:
        """The stack under "model.", then lm_head, in torch's order."""
        yield from stack_modules(geometry, "model.")
        yield head_module(geometry, "model.", geometry.tie_word_embeddings)

    def image_tokens(self, geometry: DecoderGeometry, image_size: int | None) -> int:
        """Raises InputError: there are no images."""
        problem = f"{geometry.model_type} models take no images"
        raise InputError(Problem("images_per_sample", problem, allowed="0"))

    image_features = image_tokens

    def forward(
        self, t: Engine, loaded: Loaded, geometry: DecoderGeometry, batch: Batch
    ) -> tuple[Tensor, Tensor | None]:
        """`...ForCausalLM.forward`: (loss, logits)."""
        decoder = Decoder(t, loaded, geometry, "model.")
        embeds = decoder.embed(batch.ids)
        hidden = decoder.layers(embeds)
        del embeds  # `inputs_embeds` lives until the backbone's forward returns
        return head_and_loss(t, loaded, geometry, hidden, batch.labels)


def nested_decoder(
    reader: Reader, families: Mapping[str, CausalLM], default: str
) -> DecoderGeometry:
    """The decoder that a `text_config` describes: its model_type is one of `families`."""
    model_type = reader.text("model_type", default)
    if model_type not in families:
        known = ", ".join(families)
        reader.reject("model_type", "is not a known text model", model_type, known)
        model_type = default
    return families[model_type].decoder(reader, nested=True)
