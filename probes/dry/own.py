"""A model that transformers does not ship: a folder whose config.json names python files beside it
(`auto_map`), or a class in a file or module of the user's own. Their code runs here, so only when
it is asked for."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from planner.errors import InputError, Problem

_CLASSES = ("AutoModelForImageTextToText", "AutoModelForCausalLM", "AutoModelForSeq2SeqLM",
            "AutoModel")  # fmt: skip


@dataclass(frozen=True, slots=True)
class OwnCode:
    """What the user allows and names. trust: run a folder's python files; model_class:
    "path/to/file.py:Class" or "module:Class"."""

    trust: bool = False
    model_class: str | None = None


@dataclass(frozen=True, slots=True)
class Own:
    """A config and the class that is built from it; note: what the answer must say."""

    config: PretrainedConfig
    cls: type[PreTrainedModel] | None
    note: str | None = None


def resolve(name: str, code: OwnCode) -> Own | None:
    """The user's own class for `name`, or None where transformers ships it.

    Raises InputError where code would have to run that nobody asked for, or does not load.
    """
    values = _config_values(name)
    if code.model_class:
        cls = _named_class(code.model_class)
        return Own(_config_of(name, values, cls, code.trust), cls)
    named = dict((values or {}).get("auto_map") or {})
    if not named:
        return None
    if not code.trust:
        if (values or {}).get("model_type") not in CONFIG_MAPPING:
            allowed = "--trust-code, once you have read them"
            raise InputError(
                Problem("model", "needs the python files of its folder", name, allowed)
            )
        note = "the folder's own code (auto_map) was not run: transformers' class of its type was"
        return Own(_auto_config(name, trust=False), None, note)
    reference = next((named[auto] for auto in _CLASSES if named.get(auto)), None)
    if reference is None:
        return Own(_auto_config(name, trust=True), None)
    try:
        cls = get_class_from_dynamic_module(_first(reference), name, local_files_only=True)
    except Exception as error:  # the user's file may raise anything
        raise _failed("model", name, error) from None
    return Own(_auto_config(name, trust=True), _checked(cls, "model", str(reference)))


def accepted(model: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """Of `inputs` those that the model's forward takes: `Trainer` drops the other columns, and the
    number of items where no **kwargs would take it."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    parameters = inspect.signature(base.forward).parameters.values()
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters):
        return inputs
    names = {p.name for p in parameters}
    return {name: value for name, value in inputs.items() if name in names}


def _config_values(name: str) -> dict[str, Any] | None:
    path = Path(name)
    path = path / "config.json" if path.is_dir() else path
    if not path.is_file():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _failed("model", name, error) from None
    return values if isinstance(values, dict) else None


def _named_class(text: str) -> type[PreTrainedModel]:
    where, _, name = text.rpartition(":")
    if not where or not name:
        allowed = "path/to/file.py:Class or module:Class"
        raise InputError(Problem("--model-class", "names no class", text, allowed))
    try:
        module = _of_file(Path(where)) if where.endswith(".py") else importlib.import_module(where)
        cls = getattr(module, name)
    except Exception as error:
        raise _failed("--model-class", text, error) from None
    return _checked(cls, "--model-class", text)


def _of_file(path: Path) -> Any:
    """The file as a module; files beside it can be imported by name."""
    name = f"vramwise_own_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    sys.path.insert(0, str(path.absolute().parent))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.pop(0)
    return module


def _checked(cls: Any, field: str, text: str) -> type[PreTrainedModel]:
    if isinstance(cls, type) and issubclass(cls, PreTrainedModel):
        return cls
    raise InputError(Problem(field, "is not a PreTrainedModel of transformers", text))


def _config_of(
    name: str, values: dict[str, Any] | None, cls: type[PreTrainedModel], trust: bool
) -> PretrainedConfig:
    """By the class's own config class where it has one."""
    own: Any = cls.config_class
    if own is None or own is PretrainedConfig:
        return _auto_config(name, trust)
    if values is None:
        raise InputError(
            Problem("model", "is no folder with a config", name, "a folder or a config.json")
        )
    try:
        return own.from_dict(values)
    except Exception as error:
        raise _failed("model", name, error) from None


def _auto_config(name: str, trust: bool) -> PretrainedConfig:
    try:
        return AutoConfig.from_pretrained(name, local_files_only=True, trust_remote_code=trust)
    except Exception as error:
        raise _failed("model", name, error) from None


def _first(reference: Any) -> str:
    return str(reference[0] if isinstance(reference, (list, tuple)) else reference)


def _failed(field: str, text: str, error: Exception) -> InputError:
    lines = str(error).splitlines() or [""]
    return InputError(Problem(field, f"cannot be loaded: {type(error).__name__}: {lines[0]}", text))
