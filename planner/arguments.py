"""Flags of a run spec: one for every field, plus MODEL, --gpu, --memory, --spec, --json."""

from __future__ import annotations

import argparse
import types
from collections.abc import Iterable
from typing import Any, NoReturn, Union, get_args, get_origin

from pydantic import BaseModel

from planner.errors import InputError, Problem, nearest_name
from planner.spec import RunSpec, read_mapping, spec_from_mapping

_ALIASES = {"device": ("--gpu",), "device_memory": ("--memory",)}


class _Parser(argparse.ArgumentParser):
    """Errors as the project's own, with the nearest flag."""

    def error(self, message: str) -> NoReturn:
        if message.startswith("unrecognized arguments:"):
            unknown = message.partition(":")[2].split()[0]
            flags = [flag for action in self._actions for flag in action.option_strings]
            near = nearest_name(unknown, flags)
            raise InputError(Problem("arguments", f"{unknown} is not known", nearest=near))
        raise InputError(Problem("arguments", message))


def spec_parser(verb: str, description: str = "") -> argparse.ArgumentParser:
    """A parser with MODEL and a flag for every field of the run spec."""
    parser = _Parser(prog=f"vramwise {verb}", description=description, allow_abbrev=False)
    parser.add_argument("model", nargs="?", help="a name, a Hugging Face id, a folder or a config")
    parser.add_argument("--spec", metavar="FILE", help="a run spec in TOML or JSON; - is stdin")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of text")
    fields = parser.add_argument_group("run spec")
    for path, annotation in _fields(RunSpec, ()):
        if path == ("model",):
            continue
        flag = "--" + "-".join(path).replace("_", "-")
        names = [flag, *_ALIASES.get(path[0], ())]
        if flag != flag.replace("-", "_").replace("__", "--", 1):
            names.append("--" + "-".join(path).replace("-", "_"))
        fields.add_argument(
            *dict.fromkeys(names), dest=".".join(path), metavar="VALUE",
            **({"nargs": "?", "const": "true"} if _is_bool(annotation) else {}),
            help=argparse.SUPPRESS if path[0] == "versions" else None,
        )  # fmt: skip
    return parser


def spec_arguments(
    verb: str, arguments: list[str], parser: argparse.ArgumentParser | None = None
) -> tuple[RunSpec, argparse.Namespace]:
    """Parse flags (over a --spec file) into a RunSpec; raises InputError for every bad one."""
    options = (parser or spec_parser(verb)).parse_args(arguments)
    return spec_from_mapping(spec_values(options)), options


def spec_values(options: argparse.Namespace) -> dict[str, Any]:
    """The mapping that flags and the --spec file describe; flags win."""
    values: dict[str, Any] = read_mapping(options.spec) if options.spec else {}
    if options.model is not None:
        values["model"] = options.model
    types_of = dict(_fields(RunSpec, ()))
    for dotted, text in vars(options).items():
        path = tuple(dotted.split("."))
        if text is None or path == ("model",) or path not in types_of:
            continue
        target = values
        for part in path[:-1]:
            target = target.setdefault(part, {})
        target[path[-1]] = parse_value(text, types_of[path])
    return values


def parse_value(text: str, annotation: Any) -> Any:
    """A flag's text as the field's type; left as text where it is none, for the spec to refuse."""
    kinds = _kinds(annotation)
    if bool in kinds and text.lower() in ("true", "false", "yes", "no", "on", "off", "1", "0"):
        return text.lower() in ("true", "yes", "on", "1")
    for kind in (int, float):
        if kind in kinds:
            try:
                return kind(text)
            except ValueError:
                continue
    return text


def _fields(model: type[BaseModel], prefix: tuple[str, ...]) -> Iterable[tuple[tuple[str, ...], Any]]:
    for name, info in model.model_fields.items():
        annotation = info.annotation
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            yield from _fields(annotation, (*prefix, name))
        else:
            yield (*prefix, name), annotation


def _kinds(annotation: Any) -> set[Any]:
    if get_origin(annotation) in (Union, types.UnionType):
        return {kind for part in get_args(annotation) for kind in _kinds(part)}
    if hasattr(annotation, "__metadata__"):
        return _kinds(get_args(annotation)[0])
    return {annotation}


def _is_bool(annotation: Any) -> bool:
    return bool in _kinds(annotation)
