"""Command-line flags: one for every field of a run spec (--gpu and --memory among them), and those
a verb adds. Small on purpose: parsing must not cost more than the answer, and all that is wrong
with a command is told at once."""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel

from planner.errors import InputError, Problem, nearest_name
from planner.spec import RunSpec, read_mapping, spec_from_mapping

Path = tuple[str, ...]
_ALIASES = {"gpu": "device", "memory": "device_memory", "rank": "lora.rank"}
_TRUE, _FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")


@dataclass(frozen=True)
class Flag:
    """A flag that a verb takes beside the run spec's. metavar None: a switch."""

    name: str
    help: str
    metavar: str | None = None


COMMON = (
    Flag("spec", "a run spec in TOML or JSON; - is standard input; flags win over it", "FILE"),
    Flag("json", "one JSON object instead of text"),
)


@dataclass
class Arguments:
    """What was given: the verb's own flags (by name, text or True), positionals, spec fields by
    path, and what was wrong so far."""

    given: dict[str, Any] = field(default_factory=dict)
    positionals: list[str] = field(default_factory=list)
    fields: dict[Path, str] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    @property
    def json(self) -> bool:
        return bool(self.given.get("json"))

    def values(self) -> dict[str, Any]:
        """The mapping that the --spec file and the flags describe; flags win."""
        source = self.given.get("spec")
        values: dict[str, Any] = read_mapping(source) if source else {}
        for path, text in self.fields.items():
            target = values
            for part in path[:-1]:
                inner = target.setdefault(part, {})
                target = inner if isinstance(inner, dict) else {}
            target[path[-1]] = parse_value(text, field_types()[path])
        return values

    def run_spec(self) -> RunSpec:
        """The run spec; raises InputError with everything that is wrong."""
        try:
            spec = spec_from_mapping(self.values())
        except InputError as error:
            raise InputError([*self.problems, *error.problems]) from None
        self.check()
        return spec

    def check(self) -> None:
        """Raise what was wrong with the flags themselves."""
        if self.problems:
            raise InputError(self.problems)

    def number(self, name: str) -> float | None:
        """A flag's positive number; a problem is noted where it is none."""
        text = self.given.get(name)
        if text is None:
            return None
        try:
            value = float(text)
        except ValueError:
            value = -1.0
        if not 0 < value < 1e12:
            flag = name.replace("_", "-")
            self.problems.append(Problem(f"--{flag}", "is not a number above 0", text))
        return value


def parse_arguments(
    verb: str,
    arguments: Sequence[str],
    flags: Sequence[Flag] = (),
    positionals: Sequence[str] = ("MODEL",),
    description: str = "",
) -> Arguments:
    """Parse a verb's arguments; --help prints what it takes and exits.

    The last positional named MODEL becomes the spec's model. Problems are kept, not raised, so
    that they can be told together with the spec's.
    """
    known = {flag.name: flag for flag in (*COMMON, *flags)}
    if any(argument in ("-h", "--help") for argument in arguments):
        sys.stdout.write(_help(verb, known, positionals, description))
        raise SystemExit(0)
    parsed, rest = Arguments(), list(arguments)
    while rest:
        argument = rest.pop(0)
        if argument.startswith("--") and len(argument) > 2:
            full = len(parsed.positionals) >= len(positionals)
            _take_flag(parsed, known, argument[2:], rest, full)
        else:
            parsed.positionals.append(argument)
    for extra in parsed.positionals[len(positionals) :]:
        parsed.problems.append(Problem("arguments", f"{extra!r} is one too many"))
    for name, text in zip(positionals, parsed.positionals, strict=False):
        if name == "MODEL":
            parsed.fields[("model",)] = text
    return parsed


def _take_flag(
    parsed: Arguments, known: dict[str, Flag], argument: str, rest: list[str], full: bool
) -> None:
    """One flag and its value. `full`: every positional is there, so what follows is a value."""
    name, has_value, value = argument.partition("=")
    name = name.replace("_", "-")
    negated = name.startswith("no-") and _field_path(name[3:])
    path = negated or _field_path(name)
    flag = known.get(name)
    follows = bool(rest) and not rest[0].startswith("--")
    if flag is None and path is None:
        parsed.problems.append(_unknown(name, known))
        if follows and full:
            rest.pop(0)
        return
    if not has_value:
        if path and bool in kinds(field_types()[path]):
            taken = follows and (full or rest[0].lower() in _TRUE + _FALSE)
            value = rest.pop(0) if taken else "true"
        elif flag is not None and flag.metavar is None:
            value = "true"
        elif follows:
            value = rest.pop(0)
        else:
            parsed.problems.append(Problem(f"--{name}", "needs a value"))
            return
    if flag is not None:
        parsed.given[flag.name.replace("-", "_")] = value if flag.metavar else True
    elif path is not None:
        parsed.fields[path] = "false" if negated and value in _TRUE else value


def _unknown(name: str, known: dict[str, Flag]) -> Problem:
    names = [*known, *(_flag_name(path) for path in field_types()), *_ALIASES]
    near = nearest_name(name, names)
    return Problem("arguments", f"--{name} is not a flag", nearest=near and f"--{near}")


def _field_path(name: str) -> Path | None:
    folded = _ALIASES.get(name, name).replace("-", "_").replace(".", "_")
    return next((path for path in field_types() if "_".join(path) == folded), None)


def _flag_name(path: Path) -> str:
    return "-".join(path).replace("_", "-")


def parse_value(text: str, annotation: Any) -> Any:
    """A flag's text as the field's type; left as text where it is none, for the spec to refuse."""
    wanted = kinds(annotation)
    if bool in wanted and text.lower() in _TRUE + _FALSE:
        return text.lower() in _TRUE
    for kind in (int, float):
        if kind in wanted:
            try:
                return kind(text)
            except ValueError:
                continue
    return text


_types: dict[Path, Any] = {}


def field_types() -> dict[Path, Any]:
    """Dotted path of every leaf field of the run spec -> its annotation."""
    if not _types:
        _types.update(_leaves(RunSpec, ()))
    return _types


def _leaves(model: type[BaseModel], prefix: Path) -> Iterator[tuple[Path, Any]]:
    for name, info in model.model_fields.items():
        annotation = info.annotation
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            yield from _leaves(annotation, (*prefix, name))
        else:
            yield (*prefix, name), annotation


def kinds(annotation: Any) -> set[Any]:
    """The plain types inside an annotation: {int, NoneType} for `Count | None`."""
    if get_origin(annotation) in (Union, types.UnionType):
        return {kind for part in get_args(annotation) for kind in kinds(part)}
    if hasattr(annotation, "__metadata__"):
        return kinds(get_args(annotation)[0])
    return {annotation}


def _help(
    verb: str, known: dict[str, Flag], positionals: Sequence[str], description: str
) -> str:  # fmt: skip
    places = " ".join(f"[{name}]" for name in positionals)
    lines = [f"usage: vramwise {verb} {places} [flags]", ""]
    lines += [description.strip(), ""] if description else []
    for flag in known.values():
        lines.append(f"  {f'--{flag.name} {flag.metavar or str()}':<34} {flag.help}")
    lines += ["", "run spec (--gpu is --device, --memory is --device-memory):"]
    defaults = RunSpec.model_construct(model="")
    for path, annotation in field_types().items():
        if path != ("model",):
            default: Any = defaults
            for part in path:
                default = getattr(default, part)
            lines.append(f"  {'--' + _flag_name(path):<34} {_allowed(annotation)} [{default}]")
    return "\n".join(lines) + "\n"


def _allowed(annotation: Any) -> str:
    found = kinds(annotation) - {type(None)}
    literal = [kind for kind in found if get_origin(kind) is Literal]
    if literal and len(get_args(literal[0])) > 1:
        return ", ".join(str(value) for value in get_args(literal[0]))
    if bool in found:
        return "true or false"
    names = {int: "a whole number", float: "a number", str: "a name"}
    return next((text for kind, text in names.items() if kind in found), "names, comma-separated")
