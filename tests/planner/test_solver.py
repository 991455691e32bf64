"""The largest that fits: it fits, the next does not, and a linear search finds the same."""

from __future__ import annotations

import json

import pytest

from planner.cli import main
from planner.errors import InputError
from planner.estimate import estimate
from planner.levers import apply
from planner.solver import largest
from tests.planner.tiny import tiny_spec

MEMORY = {"device_memory": "1.2GiB", "sequence_length": 256}


@pytest.mark.parametrize("field", ["micro_batch_size", "sequence_length", "lora.rank"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_value_fits_and_the_next_does_not(tiny: str, field: str, checkpointing: bool) -> None:
    spec = tiny_spec(tiny, **MEMORY, gradient_checkpointing=checkpointing)
    found = largest(spec, field)
    assert found.value is not None
    assert estimate(apply(spec, {field: found.value})).verdict == "fits"
    if found.beyond is not None:
        assert estimate(apply(spec, {field: found.value + 1})).verdict != "fits"
    else:
        assert found.limit


def test_no_smaller_than_a_linear_search_finds(tiny: str) -> None:
    """The allocator's segments make the border ragged by a value or two: the largest counts."""
    spec = tiny_spec(tiny, **MEMORY)
    value = 1
    while estimate(apply(spec, {"micro_batch_size": value + 1})).verdict == "fits":
        value += 1
    assert value > 3  # a search that had something to find
    found = largest(spec, "micro_batch_size").value
    assert found is not None
    assert value <= found <= value * 1.15


def test_sequence_stops_at_the_models_positions(tiny: str) -> None:
    found = largest(tiny_spec(tiny, device_memory="80GiB"), "sequence_length")
    assert (found.value, found.beyond) == (4096, None)
    assert "positions" in found.limit


def test_nothing_fits_is_said(tiny: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["fit", tiny, "--gpu", "rtx-3090", "--memory", "100MiB", "--max", "rank"]
    assert main(arguments) == 1
    assert capsys.readouterr().out.startswith("No lora.rank fits")
    assert main([*arguments, "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["value"] is None


def test_images_are_solved_within_the_sequence() -> None:
    from planner.spec import spec_from_mapping

    spec = spec_from_mapping({"model": "chameleon-7b", "device": "h200", "sequence_length": 2100})
    found = largest(spec, "images")
    assert (found.field, found.value) == ("images_per_sample", 2)
    assert "2100" in found.limit


def test_unknown_field_names_those_that_are(tiny: str) -> None:
    with pytest.raises(InputError, match="micro_batch_size"):
        largest(tiny_spec(tiny), "colour")
