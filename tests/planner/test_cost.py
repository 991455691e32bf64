"""What a run takes: steps as `Trainer` counts them, checkpoints as it saves them."""

from __future__ import annotations

import pytest

from planner.cost import checkpoint_bytes, optimizer_steps, run_cost
from planner.estimate import estimate
from tests.planner.tiny import tiny_spec


@pytest.mark.parametrize(("samples", "epochs", "batch", "accumulation", "steps"), [
    (1000, 1.0, 1, 1, 1000), (1000, 3.0, 4, 8, 96), (1001, 1.0, 4, 1, 251), (10, 2.5, 4, 2, 5),
    (1, 1.0, 8, 8, 1),
])  # fmt: skip
def test_optimizer_steps(
    tiny: str, samples: int, epochs: float, batch: int, accumulation: int, steps: int
) -> None:
    """batches = ceil(samples / batch), updates an epoch = ceil(batches / accumulation)."""
    spec = tiny_spec(
        tiny, micro_batch_size=batch, gradient_accumulation_steps=accumulation,
        schedule={"samples": samples, "epochs": epochs},
    )  # fmt: skip
    assert optimizer_steps(spec) == steps


def test_max_steps_wins_and_no_schedule_has_no_cost(tiny: str) -> None:
    assert optimizer_steps(tiny_spec(tiny, schedule={"samples": 9, "max_steps": 4})) == 4
    assert run_cost(estimate(tiny_spec(tiny))) is None


def test_cost_is_steps_times_seconds_and_price(tiny: str) -> None:
    answer = estimate(tiny_spec(tiny, schedule={"max_steps": 1000, "save_every_steps": 300}))
    cost = run_cost(answer, price_per_hour=2.0)
    assert cost is not None
    assert cost["total_seconds"] == pytest.approx(1000 * answer.step_seconds)
    assert cost["cost"] == pytest.approx(2.0 * cost["hours"])
    assert cost["checkpoints"] == 3
    assert cost["checkpoints_bytes"] == 3 * checkpoint_bytes(answer)


def test_checkpoint_of_lora_is_adapters_and_two_states_in_fp32(tiny: str) -> None:
    answer = estimate(tiny_spec(tiny, optimizer="adamw_torch"))
    exact = answer.parameters.trainable * 4 * 3
    assert exact <= checkpoint_bytes(answer) <= exact * 1.02  # blocks round up to 512 bytes


def test_evaluation_takes_time_but_less_than_training_on_as_much(tiny: str) -> None:
    schedule = {"max_steps": 100, "evaluate_every_steps": 10, "evaluation_samples": 64}
    spec = tiny_spec(tiny, sequence_length=2048, evaluation_batch_size=1, schedule=schedule)
    answer = estimate(spec)
    cost = run_cost(answer)
    assert cost is not None
    assert 0 < cost["evaluation_seconds"] < 10 * 64 * answer.step_seconds
    assert cost["total_seconds"] == pytest.approx(
        100 * answer.step_seconds + cost["evaluation_seconds"]
    )
