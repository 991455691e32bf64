"""A model's name -> its transformers configuration and class, offline where possible."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
)

from planner.errors import InputError, Problem, UnsupportedError, VramwiseError
from planner.models.registry import load_model

# facebook/chameleon-7b's tokenizer: 8,192 image codes from id 4 on, the placeholder at 8711.
CHAMELEON_FIRST_IMAGE_ID = 4
CHAMELEON_PLACEHOLDER_ID = 8711


def load_config(source: str | PretrainedConfig | dict[str, Any]) -> PretrainedConfig:
    """Configuration object, mapping, folder, config.json, catalogue or Hub name -> configuration.

    Raises InputError when nothing of that name can be read.
    """
    if isinstance(source, PretrainedConfig):
        return _completed(source)
    if isinstance(source, dict):
        return _completed(_from_mapping(source))
    if Path(source).is_dir():
        return _completed(AutoConfig.from_pretrained(source))
    try:
        return _completed(_from_mapping(dict(load_model(source).config)))
    except VramwiseError as error:
        return _completed(_from_hub(source, error))


def model_class(config: PretrainedConfig) -> type[PreTrainedModel]:
    """The class that trains this configuration: the image-text one where there is one, as the
    architecture names it otherwise. Raises UnsupportedError for a family without either."""
    for mapping in (MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING):
        if type(config) in mapping:
            found: Any = mapping[type(config)]
            chosen: type[PreTrainedModel] = found[0] if isinstance(found, tuple) else found
            return chosen
    raise UnsupportedError(f"model_type {config.model_type!r} has no generative class to train")


def chameleon_vocabulary_map(
    codes: int,
    first_id: int = CHAMELEON_FIRST_IMAGE_ID,
    placeholder_id: int = CHAMELEON_PLACEHOLDER_ID,
) -> dict[str, int]:
    """Token names as the Chameleon tokenizer writes them: digits of an image code as letters
    (A is 0) between "IMGIMG" and "Z", ids from `first_id` on, and "<image>"."""
    letters = str.maketrans("0123456789", "ABCDEFGHIJ")
    names = {f"IMGIMG{str(code).translate(letters)}Z": first_id + code for code in range(codes)}
    return {**names, "<image>": placeholder_id}


def _from_mapping(values: dict[str, Any]) -> PretrainedConfig:
    values = dict(values)
    model_type = values.pop("model_type", None)
    if model_type is None:
        raise InputError(Problem("model", "its config.json names no model_type"))
    try:
        return AutoConfig.for_model(model_type, **values)
    except ValueError:
        raise UnsupportedError(f"model_type {model_type!r} is unknown to transformers") from None


def _from_hub(source: str, reason: VramwiseError) -> PretrainedConfig:
    """A name that the planner does not know, from the Hub; its own reason where that fails too."""
    try:
        return AutoConfig.from_pretrained(source)
    except (OSError, ValueError):
        raise reason from None


def _completed(config: PretrainedConfig) -> PretrainedConfig:
    """A Chameleon without its vocabulary map cannot run: give it the published one's layout."""
    if config.model_type == "chameleon" and not config.vocabulary_map:
        config.vocabulary_map = chameleon_vocabulary_map(config.vq_config.num_embeddings)
        config.image_token_id = config.vocabulary_map["<image>"]
    return config
