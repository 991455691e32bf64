"""Real transformers models on the meta device, built once a run from the same configs."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import pytest
import torch
import transformers

from planner.models.registry import Model
from recipes.lavin.config import LavinConfig, lavin_config
from recipes.lavin.model import Lavin

# A map with one image code, which ChameleonModel needs to be built; no parameter depends on it.
VOCABULARY_MAP = {"<image>": 8711, "IMGIMGA": 4}


@functools.lru_cache(maxsize=1)
def meta_model(model: Model) -> Any:
    """The transformers class that the family names, at full depth, without storage."""
    if model.model_type == "lavin":
        return _lavin(model)
    values = {key: value for key, value in model.config.items() if key != "model_type"}
    if model.model_type == "chameleon":
        values["vocabulary_map"] = VOCABULARY_MAP
    config = transformers.AutoConfig.for_model(model.model_type, **values)
    cls = getattr(transformers, model.family.AUTO_CLASS)
    build = cls.from_config if hasattr(cls, "from_config") else cls._from_config
    with torch.device("meta"):
        return build(config)


def _lavin(model: Model) -> Any:
    """The recipe's own model."""
    name = model.id.partition("/")[2].lower()
    config = _published_sizes(model) if name == "lavin-30b" else lavin_config(name)
    with torch.device("meta"):
        language = transformers.LlamaForCausalLM(config.text)
        return Lavin(language, transformers.CLIPVisionModel(config.vision), config)


def _published_sizes(model: Model) -> LavinConfig:
    """A size that the recipe does not name."""
    text = transformers.LlamaConfig(**model.config["text_config"])
    return dataclasses.replace(lavin_config("lavin-65b"), text=text)


@pytest.fixture(autouse=True, scope="session")
def _quiet() -> None:
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
