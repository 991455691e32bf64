"""`vramwise gpus`: a row for every card, each what `fit` answers on it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from planner.cards import card_rows
from planner.cli import main
from planner.devices import all_devices
from planner.estimate import estimate
from tests.planner.tiny import tiny_spec


def test_every_card_equals_fit_on_it(tiny: str) -> None:
    spec = tiny_spec(tiny, sequence_length=2048, micro_batch_size=16, evaluation_batch_size=4)
    rows = card_rows(spec)
    assert {row.device.id for row in rows} == {device.id for device in all_devices()}
    for row in rows[::7]:
        answer = estimate(spec.model_copy(update={"device": row.device.id}))
        assert row.fit.verdict == answer.verdict
        assert row.device_required_bytes == answer.device_required_bytes
        assert row.fit.speed.step_s == answer.step_seconds


def test_cards_that_fit_stand_first_and_prices_order_them(tiny: str) -> None:
    spec = tiny_spec(tiny, sequence_length=4096, micro_batch_size=32)
    rows = card_rows(spec, {"rtx-3090": 0.2, "h200": 3.0})
    order = ["fits", "tight", "does_not_fit"]
    ranks = [order.index(row.fit.verdict) for row in rows]
    assert ranks == sorted(ranks)
    assert len(set(ranks)) > 1
    fitting = [row for row in rows if row.fit.verdict == "fits"]
    costs = [row.cost_per_million_tokens for row in fitting if row.cost_per_million_tokens]
    assert costs == sorted(costs)
    assert fitting[0].cost_per_million_tokens is not None


def test_cost_is_price_times_hours(
    tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prices = tmp_path / "prices.toml"
    prices.write_text('"rtx-3090" = 0.36\n')
    assert (
        main(["gpus", tiny, "--prices", str(prices), "--schedule-max-steps", "1000", "--json"]) == 0
    )
    rows = {row["device"]: row for row in json.loads(capsys.readouterr().out)}
    row = rows["rtx-3090"]
    assert row["run_hours"] == pytest.approx(1000 * row["step_seconds"] / 3600)
    assert row["run_cost"] == pytest.approx(0.36 * row["run_hours"])
    million_seconds = 1e6 / row["tokens_per_second"]
    assert row["cost_per_million_tokens"] == pytest.approx(million_seconds / 3600 * 0.36)
    assert rows["h200"]["run_cost"] is None


def test_text_names_the_smallest_and_what_cards_cannot_do(
    tiny: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["gpus", tiny]) == 0
    text = capsys.readouterr().out
    assert f"of {len(all_devices())} cards fit it" in text.splitlines()[0]
    assert "emulates bf16" in text
    assert "flash_attention_2" not in text  # not asked for
    assert main(["gpus", tiny, "--precision", "fp16", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert not any("bf16" in limit for row in rows for limit in row["limits"])
