"""Published ladders: figures of fit, published numbers as data, measured rows joined where there
are any."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from planner.cli import main
from planner.errors import InputError
from planner.estimate import estimate
from planner.measured_ladder import _DEFAULTS, _SETTINGS, find_measured, ladder_rows
from planner.seed_ladder import Published, climb_seed, seed_of
from planner.spec import RunSpec, spec_from_mapping

# LaVIN's README, "GPU memory" of the 16-bit models on 2 GPUs at 4 samples each, in GB.
README_GB = {"lavin-7b": 33.9, "lavin-13b": 55.9}
KEYS = ["full", "adapters", "4bit", "batch", "checkpointing", "8bit", "paged"]


def measured_row(spec: RunSpec, **changes: Any) -> dict[str, Any]:
    """A line as recipes.lavin.measure prints it."""
    settings = {name: getattr(spec, name) for name in _SETTINGS}
    return {
        "outcome": "ok", "model": "lavin-7b", **settings, **_DEFAULTS,
        "gradient_accumulation_steps": 1, "device": "NVIDIA H200",
        "peak_allocated_bytes": 5 << 30, "peak_reserved_bytes": 6 << 30,
        "allocator_required_bytes": (5 << 30) + (1 << 28), "non_torch_bytes": 1 << 29,
        "step_seconds": 0.5, **changes,
    }  # fmt: skip


@pytest.mark.parametrize("model", README_GB)
def test_sixteen_bits_as_published_are_near_the_published_figure(model: str) -> None:
    rung = next(rung for rung in climb_seed(model, {}, []) if rung.key == "adapters")
    assert rung.then.row.device_required_bytes == pytest.approx(README_GB[model] * 1e9, rel=0.05)
    assert abs(rung.off or 0) < 0.05


@pytest.mark.parametrize("model", README_GB)
def test_every_rung_changes_one_lever_and_is_what_fit_says(model: str) -> None:
    rungs = climb_seed(model, {}, [])
    assert [rung.key for rung in rungs] == KEYS
    for rung in rungs:
        answer = estimate(rung.today.spec)
        assert rung.today.row.device_required_bytes == answer.device_required_bytes
        assert len(rung.why) > 20
        assert rung.measured is None
    assert rungs[0].today.spec.method == "full"
    assert rungs[-1].today.spec.optimizer == "paged_adamw_8bit"
    assert rungs[1].then.spec.versions.bitsandbytes == "0.39.0"


def test_old_bitsandbytes_and_eager_attention_cost_what_the_ladder_s_second_column_shows() -> None:
    for rung in climb_seed("lavin-7b", {}, []):
        if rung.key in ("4bit", "batch"):
            new, old = rung.today.row, rung.then.row
            assert (old.peak_allocated_bytes or 0) > 1.2 * (new.peak_allocated_bytes or 0)


@pytest.mark.parametrize(("published", "size", "off"), [
    (Published("9-10", 9, 10), 9, 0.0), (Published("36+", 36), 50, 0.0),
    (Published("36+", 36), 27, -0.25), (Published("9-10", 9, 10), 12, 0.2), (Published(), 3, None),
])  # fmt: skip
def test_off_is_relative_to_the_nearest_bound(
    published: Published, size: int, off: float | None
) -> None:
    assert published.off(size) == (None if off is None else pytest.approx(off))


def test_measured_rows_are_joined_by_their_settings(tmp_path: Path) -> None:
    plain = next(rung for rung in climb_seed("lavin-7b", {}, []) if rung.key == "checkpointing")
    spec = plain.today.spec
    rows = [
        measured_row(spec, gradient_accumulation_steps=2),
        measured_row(spec, gradient_accumulation_steps=2, allocator_required_bytes=None),
        measured_row(spec, gradient_accumulation_steps=2, routing="bottleneck", device="other"),
        measured_row(spec, gradient_accumulation_steps=2, cap_bytes=1 << 40, device="other"),
        measured_row(spec, model="lavin-13b", gradient_accumulation_steps=2, device="other"),
        measured_row(spec, model="lavin-tiny", gradient_accumulation_steps=2, device="other"),
        measured_row(spec, device="other"),
    ]
    (tmp_path / "h200.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    rungs = {rung.key: rung for rung in climb_seed("lavin-7b", {}, ladder_rows(tmp_path))}
    found = rungs["checkpointing"].measured
    assert found is not None
    assert (found.device, found.required_bytes) == ("NVIDIA H200", (5 << 30) + (1 << 28))
    assert [key for key, rung in rungs.items() if rung.measured] == ["checkpointing"]


def test_a_run_out_of_memory_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = next(r for r in climb_seed("lavin-7b", {}, []) if r.key == "adapters").today.spec
    row = {"outcome": "oom", **{k: measured_row(spec)[k] for k in ("model", *_SETTINGS, "device")}}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    assert main(["ladder", "lavin-7b", "--measured", str(tmp_path)]) == 0
    told = capsys.readouterr().out
    assert "out of memory (NVIDIA H200)" in told
    assert told.count("| predicted |") == len(KEYS) - 1


def test_a_broken_line_is_named(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"outcome": "ok"}\n{"outco')
    with pytest.raises(InputError, match="line 2"):
        ladder_rows(tmp_path)
    assert find_measured(climb_seed("lavin-7b", {}, [])[1].today.spec, [{"outcome": "ok"}]) is None


def test_the_verb_answers_without_a_card_and_with_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ladder", "lavin-7b", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["key"] for row in rows] == KEYS
    assert rows[2]["published"]["quoted"] == "36+ GB"
    assert main(["ladder", "lavin-65b", "--gpu", "a100-40gb", "--format", "csv"]) == 0
    told = capsys.readouterr().out
    assert "LLaVA" not in told.split("\n", 1)[1]
    assert main(["ladder", "llama-7b", "--gpu", "h200", "--measured", "x"]) == 2
    assert seed_of("llama-7b") is None


def test_measured_ladder_is_predicted() -> None:
    """Every row of the shipped ladder (random weights, built without from_pretrained's warm-up)."""
    rows = [row for row in ladder_rows() if row["outcome"] == "ok"]
    assert len(rows) >= 33
    for row in rows:
        fields = {name: row[name] for name in (*_SETTINGS, "gradient_accumulation_steps", "model")}
        dtype = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}[row["precision"]]
        answer = estimate(spec_from_mapping({**fields, "device": "h200", "weights_dtype": dtype}))
        assert answer.parameters.trainable == row["trainable_parameters"]
        measured = row["peak_allocated_bytes"]
        assert answer.peak_allocated_bytes == pytest.approx(measured, rel=0.005), fields
        required = row.get("allocator_required_bytes")
        if required is not None:
            assert answer.allocator_required_bytes == pytest.approx(required, rel=0.015), fields
        found = find_measured(answer.spec, rows)
        assert found is not None
        fastest, slowest = answer.step_seconds_interval
        assert found.step_s is not None
        assert fastest <= found.step_s <= slowest, fields


def test_settings_are_those_that_the_recipe_measures() -> None:
    from recipes.lavin.measure import _parser, measure

    row = measure(_parser().parse_args(["--size", "tiny", "--device", "cpu", "--steps", "1",
                                        "--sequence-length", "32"]))  # fmt: skip
    assert {*_SETTINGS, *_DEFAULTS, "model", "device", "outcome"} <= row.keys()
