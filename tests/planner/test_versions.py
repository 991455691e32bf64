"""Versions, and switches, that are not modelled: told and widened, never answered in silence."""

from __future__ import annotations

import pytest

from planner.errors import InputError
from planner.estimate import estimate
from planner.spec import spec_from_mapping
from tests.planner.tiny import tiny_spec


@pytest.mark.parametrize(("library", "version"), [
    ("torch", "2.5.1"), ("torch", "2.13.0"), ("transformers", "4.46.2"), ("peft", "0.12.0"),
    ("accelerate", "0.34.0"), ("bitsandbytes", "0.44.1"),
])  # fmt: skip
def test_another_release_line_is_told_and_widened(tiny: str, library: str, version: str) -> None:
    spec = {"quantization": "nf4", "device": "h200"}
    known = estimate(tiny_spec(tiny, **spec))
    other = estimate(tiny_spec(tiny, **spec, versions={library: version}))
    assert any(f"{library} {version}" in note for note in other.notes)
    assert not any(library in note for note in known.notes)
    assert known.basis == "calibrated"
    assert other.basis == "analytic"
    (low, high), (wide_low, wide_high) = (
        answer.allocator_required_interval_bytes for answer in (known, other)
    )
    assert wide_low < low <= high < wide_high


@pytest.mark.parametrize(("version", "keeps"), [("0.39.0", True), ("0.43.1", True),
                                                ("0.43", True), ("0.43.2", False)])  # fmt: skip
def test_old_bitsandbytes_keeps_the_inputs_of_4_bit_linears(
    tiny: str, version: str, keeps: bool
) -> None:
    """The first release without was 0.43.2 (bitsandbytes pull request 1270)."""
    fields = {"quantization": "nf4", "lora": {"target_modules": ("q_proj",)}}
    known = estimate(tiny_spec(tiny, **fields))
    old = estimate(tiny_spec(tiny, **fields, versions={"bitsandbytes": version}))
    assert (old.peak_allocated_bytes > known.peak_allocated_bytes) is keeps
    assert any("keeps the inputs" in note for note in old.notes) is keeps
    wide = estimate(tiny_spec(tiny, quantization="none"))
    same = estimate(tiny_spec(tiny, quantization="none", versions={"bitsandbytes": version}))
    assert same.peak_allocated_bytes == wide.peak_allocated_bytes


def test_a_patch_release_and_a_build_change_nothing(tiny: str) -> None:
    known = estimate(tiny_spec(tiny))
    other = estimate(tiny_spec(tiny, versions={"torch": "2.11.9+cu130", "peft": "0.21.2"}))
    assert (other.notes, other.basis) == (known.notes, known.basis)


def test_a_library_that_the_run_does_not_load_is_not_told(tiny: str) -> None:
    versions = {"peft": "0.12.0", "bitsandbytes": "0.43.1"}
    fields = {"method": "full", "quantization": "none"}
    notes = estimate(tiny_spec(tiny, **fields, versions=versions)).notes
    assert not any("peft" in note or "bitsandbytes" in note for note in notes)
    paged = estimate(
        tiny_spec(tiny, **fields, versions=versions, optimizer="paged_adamw_8bit")
    ).notes
    assert any("bitsandbytes" in note for note in paged)


@pytest.mark.parametrize("version", ["latest", "", "2", "v2.11"])
def test_what_is_no_version_is_refused(version: str) -> None:
    with pytest.raises(InputError, match=r"versions\.torch"):
        spec_from_mapping({"model": "m", "versions": {"torch": version}})


@pytest.mark.parametrize(("fields", "told"), [
    ({"attention": "flash_attention_2", "device": "t4"}, "cannot run flash_attention_2"),
    ({"precision": "bf16", "device": "t4"}, "no bf16"),
    ({"quantization": "int8", "device": "p100-16gb"}, "cannot run bitsandbytes int8"),
    ({"liger": True, "stack": "lean"}, "liger is not modelled"),
])  # fmt: skip
def test_what_a_card_cannot_do_is_told(tiny: str, fields: dict[str, object], told: str) -> None:
    assert any(told in note for note in estimate(tiny_spec(tiny, **fields)).notes)
    modern = estimate(tiny_spec(tiny, device="rtx-4090", precision="fp16"))
    assert not any(told in note for note in modern.notes)
