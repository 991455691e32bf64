"""The run spec: strict, frozen, its defaults documented, sizes with units."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from planner.errors import InputError
from planner.spec import RunSpec, parse_mapping, plain_values, spec_from_mapping
from planner.spec_plain import plainly_valid
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


_SCALARS = (
    st.none() | st.booleans() | st.integers(-2, 2**54) | st.floats() | st.just("all-linear")
    | st.sampled_from(["nf4", "lora", "fp16", "eager", "sgd", "23GiB", "q_proj,lm_head", "", "é"])
)  # fmt: skip
_SECTIONS = {
    "lora": ["rank", "alpha", "dropout", "target_modules", "bogus"],
    "schedule": ["samples", "epochs", "learning_rate", "warmup_steps", "bogus"],
    "versions": ["torch", "bogus"],
}


@st.composite
def _mappings(draw: st.DrawFn) -> dict[str, object]:
    names = st.sampled_from([name for name in RunSpec.model_fields if name not in _SECTIONS])
    values: dict[str, object] = {"model": "m", **draw(st.dictionaries(names, _SCALARS, max_size=3))}
    for section, keys in _SECTIONS.items():
        if draw(st.booleans()):
            values[section] = draw(st.dictionaries(st.sampled_from(keys), _SCALARS, max_size=2))
    return values


@settings(max_examples=600)
@given(_mappings())
def test_what_is_plainly_valid_is_what_pydantic_makes(values: dict[str, object]) -> None:
    plain = plainly_valid(RunSpec, values)
    if plain is None:  # pydantic's to say: a field that it takes may be here too
        return
    spec = RunSpec.model_validate(values)
    assert plain == spec
    assert plain.model_dump_json() == spec.model_dump_json()
    assert plain.model_fields_set == spec.model_fields_set
    assert plain_values(plain) == spec.model_dump(mode="json")


def test_what_people_write_is_plainly_valid() -> None:
    values = {"model": "m", "device_memory": "23.2GiB", "micro_batch_size": 4, "optimizer": "sgd",
              "lora": {"rank": 8, "alpha": 16, "target_modules": "q_proj,v_proj"},
              "schedule": {"samples": 100}}  # fmt: skip
    assert plainly_valid(RunSpec, values) is not None
    for wrong in ({"micro_batch_size": 0}, {"micro_batch_size": True}, {"lora": {"rank": 2.0}},
                  {"bogus": 1}, {"quantization": "nf5"}):  # fmt: skip
        assert plainly_valid(RunSpec, {**values, **wrong}) is None


def test_a_full_fine_tune_is_not_quantised_unless_it_says_so() -> None:
    assert spec_from_mapping({"model": "m", "method": "full"}).quantization == "none"
    assert spec_from_mapping({"model": "m", "method": "lora"}).quantization == "nf4"
    stated = {"model": "m", "method": "full", "quantization": "nf4"}
    assert spec_from_mapping(stated).quantization == "nf4"
