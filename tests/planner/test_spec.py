"""The run spec: strict, frozen, its defaults documented, sizes with units."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from planner.errors import InputError
from planner.spec import RunSpec, parse_mapping, spec_from_mapping
from planner.units import GIB, parse_bytes


def test_defaults_are_the_first_measured_rows() -> None:
    spec = RunSpec(model="m")
    assert spec.versions.torch == "2.11.0"
    assert spec.versions.transformers == "5.17.0"
    assert (spec.versions.peft, spec.versions.bitsandbytes) == ("0.21.0", "0.50.2")
    assert not spec.expandable_segments
    assert spec.max_grad_norm == 1.0


def test_spec_is_frozen_and_hashable() -> None:
    spec = RunSpec(model="m")
    with pytest.raises(ValidationError):
        spec.model = "other"
    assert hash(spec) == hash(RunSpec(model="m"))


def test_json_round_trip() -> None:
    spec = spec_from_mapping({"model": "m", "lora": {"target_modules": ["q_proj"]}})
    assert spec_from_mapping(spec.model_dump(mode="json")) == spec


@pytest.mark.parametrize(("text", "size"), [
    ("1GiB", GIB), ("1 GB", 10**9), ("23.2GiB", int(23.2 * GIB)), ("1073741824", GIB),
    ("1e9", 10**9), ("512mib", GIB // 2), (".5GiB", GIB // 2),
])  # fmt: skip
def test_sizes(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@given(st.text(max_size=20))
def test_sizes_never_crash(text: str) -> None:
    try:
        size = parse_bytes(text)
    except ValueError:
        return
    assert size >= 0


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda children: (
        st.lists(children, max_size=3)
        | st.dictionaries(st.sampled_from(["rank", "x", "alpha"]), children, max_size=3)
    ),
    max_leaves=5,
)


@given(st.dictionaries(st.sampled_from([*RunSpec.model_fields, "bogus"]), _JSON, max_size=4))
def test_any_mapping_is_a_spec_or_an_input_error(values: dict[str, object]) -> None:
    try:
        spec = spec_from_mapping(values)
    except InputError:
        return
    assert spec.model


@given(st.text(max_size=60))
def test_any_text_is_a_mapping_or_an_input_error(text: str) -> None:
    try:
        assert isinstance(parse_mapping(text, "text"), dict)
    except InputError:
        return
