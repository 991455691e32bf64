"""The `[lavin]` table of a run spec: what the planner's fields do not say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError
from transformers import CLIPVisionConfig, LlamaConfig

from planner.errors import InputError, Problem
from planner.spec import RunSpec, spec_from_mapping
from planner.spec_plain import Count, Section
from recipes.lavin.config import LavinConfig, Placement, lavin_config

Where = Literal["attention", "mlp", "both", "none"]
Layers = tuple[Annotated[int, Field(ge=0)], ...] | None


class LavinSettings(Section):
    """language, vision: folders or Hub names of a LLaMA and a CLIP checkpoint, "random" without;
    format: of the training data; test_split: of the questions asked at the end, all of them or
    `questions` drawn with every subject in its share; the rest: `recipes.lavin.config`."""

    language: str = "random"
    vision: str = "random"
    format: Literal["scienceqa", "chat"] = "scienceqa"
    train_split: str = "train"
    test_split: str = "test"
    questions: Count | None = None
    prompt_format: str = "QCM-ALE"
    captions: bool = False
    text_adapters: Where = "attention"
    text_layers: Layers = None
    vision_adapters: Where = "attention"
    vision_layers: Layers = None
    bottleneck: Count = 8
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    scale: Annotated[float, Field(gt=0)] = 1.0
    temperature: Annotated[float, Field(gt=0)] | None = None
    projector_size: Count | None = None
    visual_every: Count | None = None
    routing: Literal["outputs", "bottleneck"] = "outputs"
    published_batch: bool = False

    def config(self, spec: RunSpec) -> LavinConfig:
        """The model: the spec's size, or the checkpoints' own configurations where the spec's
        model is "lavin"; this table's settings applied."""
        if spec.model == "lavin":
            base = LavinConfig(LlamaConfig.from_pretrained(self.language),
                               CLIPVisionConfig.from_pretrained(self.vision))  # fmt: skip
        else:
            base = lavin_config(spec.model)
        given = {
            name: value
            for name in ("temperature", "projector_size", "visual_every")
            if (value := getattr(self, name)) is not None
        }
        return replace(
            base, bottleneck=self.bottleneck, dropout=self.dropout, scale=self.scale,
            routing=self.routing, published_batch=self.published_batch,
            text_adapters=_placement(self.text_adapters, self.text_layers),
            vision_adapters=_placement(self.vision_adapters, self.vision_layers), **given,
        )  # fmt: skip


def lavin_spec(values: Mapping[str, Any]) -> tuple[RunSpec, LavinSettings]:
    """A mapping with a `[lavin]` table beside the planner's fields; InputError for all that is
    wrong in either."""
    rest = dict(values)
    own = rest.pop("lavin", {})
    problems: list[Problem] = []
    settings = LavinSettings()
    try:
        settings = LavinSettings.model_validate(_tuples(own))
    except ValidationError as error:
        problems = [
            Problem("lavin." + ".".join(map(str, entry["loc"])), entry["msg"], entry["input"])
            for entry in error.errors(include_url=False)
        ]
    try:
        spec = spec_from_mapping(rest)
    except InputError as error:
        raise InputError([*error.problems, *problems]) from None
    if problems:
        raise InputError(problems)
    return spec, settings


def _tuples(own: Any) -> Any:
    if not isinstance(own, Mapping):
        return own
    return {k: tuple(v) if isinstance(v, list) else v for k, v in own.items()}


def _placement(where: Where, layers: Layers) -> Placement | None:
    return None if where == "none" else Placement(where, layers)
