"""A section of the spec, and what of it is plainly valid without pydantic's validator:
building that costs as much as an answer.

`plainly_valid` reads the annotations that pydantic reads. It accepts only what pydantic would
accept unchanged (an int as a float aside, which becomes one in both); of anything else it says
nothing, and pydantic decides. A test holds the two against each other.
"""

from __future__ import annotations

import types
from collections.abc import Iterable, Mapping
from math import isfinite
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt, MinLen
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from pydantic.fields import FieldInfo

M = TypeVar("M", bound=BaseModel)
_EXACT_FLOAT = 1 << 53  # whole numbers up to here are floats

Count = Annotated[int, Field(ge=1, le=2**24)]


class Section(BaseModel):
    """A strict, frozen part of the spec: unknown keys are refused. Its validator is built on first
    use: what is plainly valid never needs it."""

    model_config = ConfigDict(
        frozen=True, strict=True, extra="forbid", protected_namespaces=(), allow_inf_nan=False,
        defer_build=True,
    )  # fmt: skip


class _Doubt(Exception):  # noqa: N818 - no error: pydantic is asked
    """Not plainly valid."""


def plainly_valid(model: type[M], values: Mapping[str, Any]) -> M | None:
    """The section of `values` as pydantic would make it; None where that is for it to say."""
    try:
        return _section(model, values)
    except (_Doubt, ValueError, TypeError):
        return None


def _section(model: type[M], values: Mapping[str, Any]) -> M:
    fields = model.model_fields
    found = {}
    for name, value in values.items():
        info = fields.get(name)
        if info is None:
            raise _Doubt
        found[name] = _value(value, info.annotation, info.metadata)
    if any(info.is_required() and name not in found for name, info in fields.items()):
        raise _Doubt
    return model.model_construct(**found)


def _value(value: Any, annotation: Any, metadata: Iterable[Any] = ()) -> Any:
    origin = get_origin(annotation)
    if origin is Annotated:
        inner, *more = get_args(annotation)
        return _value(value, inner, [*_flat(more), *metadata])
    for rule in metadata:
        if isinstance(rule, BeforeValidator):
            value = rule.func(value)  # type: ignore[call-arg]
    value = _of_type(value, annotation, origin)
    if not all(_holds(value, rule) for rule in metadata):
        raise _Doubt
    return value


def _flat(metadata: Iterable[Any]) -> list[Any]:
    flat: list[Any] = []
    for rule in metadata:
        flat += rule.metadata if isinstance(rule, FieldInfo) else [rule]
    return flat


def _of_type(value: Any, annotation: Any, origin: Any) -> Any:
    if origin in (Union, types.UnionType):
        return _of_any(value, get_args(annotation))
    kind = type(value)
    if annotation is float and kind is int and -_EXACT_FLOAT < value < _EXACT_FLOAT:
        return float(value)
    if origin is Literal:
        accepted = kind is str and value in get_args(annotation)
    elif origin is tuple:
        inner, *rest = get_args(annotation)
        if kind is not tuple or rest != [...]:
            raise _Doubt
        return tuple(_value(item, inner) for item in value)
    elif isinstance(annotation, type) and issubclass(annotation, BaseModel):
        if kind is annotation:
            return value
        if kind is not dict:
            raise _Doubt
        return _section(annotation, value)
    elif annotation is str:
        accepted = kind is str and value.isascii()
    elif annotation is float:
        accepted = kind is float and isfinite(value)
    else:
        accepted = annotation in (int, bool, types.NoneType) and kind is annotation
    if not accepted:
        raise _Doubt
    return value


def _of_any(value: Any, branches: Iterable[Any]) -> Any:
    for branch in branches:
        try:
            return _value(value, branch)
        except _Doubt:
            continue
    raise _Doubt


def _holds(value: Any, rule: Any) -> bool:
    """Whether a constraint is known to hold; None passes those of the other branch of a union."""
    match rule:
        case BeforeValidator():
            return True
        case Ge():
            return bool(value >= rule.ge)
        case Gt():
            return bool(value > rule.gt)
        case Le():
            return bool(value <= rule.le)
        case Lt():
            return bool(value < rule.lt)
        case MinLen():
            return len(value) >= rule.min_length
    return False
