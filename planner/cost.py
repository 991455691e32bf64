"""What a whole run takes: optimizer steps, hours, money, checkpoints on disk."""

# Annotations stay objects here: named tuples would compile each string at import.
from math import ceil
from typing import TYPE_CHECKING, Any, NamedTuple

from planner.answer import Estimate
from planner.spec import RunSpec

if TYPE_CHECKING:
    from planner.memory.step import StepWork


class RunCost(NamedTuple):
    """Of one run. evaluation_seconds is part of total_seconds; cost is in the currency of the
    price, None without one. checkpoint_bytes is one checkpoint's: weights trained and optimizer
    states; checkpoints_bytes all of the run's, none deleted."""

    steps: int
    total_seconds: float
    evaluation_seconds: float
    hours: float
    cost: float | None
    tokens: int
    checkpoint_bytes: int
    checkpoints: int
    checkpoints_bytes: int


def run_cost(answer: Estimate, price_per_hour: float | None = None) -> dict[str, Any] | None:
    """The cost of `answer.spec.schedule`; None where it says neither samples nor max_steps."""
    spec = answer.spec
    steps = optimizer_steps(spec)
    if steps is None:
        return None
    evaluation = _evaluation_seconds(spec, steps)
    seconds = steps * answer.step_seconds + evaluation
    size = checkpoint_bytes(answer)
    every = spec.schedule.save_every_steps
    count = max(steps // every, 1) if every else 1
    hours = seconds / 3600
    tokens = spec.micro_batch_size * spec.gradient_accumulation_steps * spec.sequence_length
    cost = None if price_per_hour is None else hours * price_per_hour
    found = RunCost(
        steps, seconds, evaluation, hours, cost, steps * tokens, size, count, count * size
    )
    return found._asdict()


def optimizer_steps(spec: RunSpec) -> int | None:
    """As `Trainer` counts them: batches rounded up, accumulation groups rounded up, epochs."""
    schedule = spec.schedule
    if schedule.max_steps is not None:
        return schedule.max_steps
    if schedule.samples is None:
        return None
    batches = -(-schedule.samples // spec.micro_batch_size)
    per_epoch = -(-batches // spec.gradient_accumulation_steps)
    return ceil(schedule.epochs * per_epoch)


def checkpoint_bytes(answer: Estimate) -> int:
    """What `Trainer` saves: adapters (or, in full fine-tuning, the model) and optimizer states.
    Leaves out the kilobytes of scheduler, random state and log."""
    kinds = ("adapters",) if answer.spec.method == "lora" else ("parameters",)
    saved = (*kinds, "optimizer_states")
    return sum(term.bytes for term in answer.terms if term.category in saved) + answer.paged_bytes


def _evaluation_seconds(spec: RunSpec, steps: int) -> float:
    """Forwards without a graph: evaluations x batches x the forward's own time."""
    schedule = spec.schedule
    if not (schedule.evaluate_every_steps and schedule.evaluation_samples):
        return 0.0
    batch = spec.evaluation_batch_size or spec.micro_batch_size
    forwards = -(-schedule.evaluation_samples // batch) * (steps // schedule.evaluate_every_steps)
    if not forwards:
        return 0.0
    from planner.estimate import device_of
    from planner.throughput.model import step_time

    one = spec.model_copy(update={"gradient_accumulation_steps": 1, "micro_batch_size": batch})
    seconds: float = step_time(one, device_of(spec), _forward_work(one)).step_s
    return forwards * seconds


def _forward_work(spec: RunSpec) -> "StepWork":
    from planner.memory.ops import Engine
    from planner.memory.program import forward_of, load, make_batch
    from planner.memory.step import StepWork, stock_loss
    from planner.memory.work import Work
    from planner.models.registry import load_model

    model = load_model(spec.model)
    engine = Engine()
    batch = make_batch(engine.recorder, spec, model)
    with engine.no_grad():
        stock_loss(engine, load(spec, model), forward_of(model), batch)
    return StepWork(engine.work, Work())
