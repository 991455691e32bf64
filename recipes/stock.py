"""The stock stack: the reference workload of the planner, through the real `Trainer`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments, default_data_collator

from planner.spec import RunSpec
from recipes.build import Built
from recipes.phases import Listener, instrument


def training_arguments(
    spec: RunSpec, output_dir: str | Path, *, on_cpu: bool = False, **overrides: Any
) -> TrainingArguments:
    """The spec in TrainingArguments' words; `overrides` as TrainingArguments takes them."""
    schedule = spec.schedule
    arguments: dict[str, Any] = {
        "output_dir": str(output_dir),
        "per_device_train_batch_size": spec.micro_batch_size,
        "gradient_accumulation_steps": spec.gradient_accumulation_steps,
        "gradient_checkpointing": spec.gradient_checkpointing,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
        "bf16": spec.precision == "bf16",
        "fp16": spec.precision == "fp16",
        "optim": spec.optimizer,
        "max_grad_norm": spec.max_grad_norm,
        "learning_rate": schedule.learning_rate,
        "warmup_steps": schedule.warmup_steps,
        "num_train_epochs": schedule.epochs,
        "max_steps": schedule.max_steps or -1,
        "seed": schedule.seed,
        "logging_steps": 1,
        "save_strategy": "steps" if schedule.save_every_steps else "no",
        "save_steps": schedule.save_every_steps or 500,
        "eval_strategy": "steps" if schedule.evaluate_every_steps else "no",
        "eval_steps": schedule.evaluate_every_steps,
        "remove_unused_columns": False,
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": on_cpu,
    }
    if spec.evaluation_batch_size:
        arguments["per_device_eval_batch_size"] = spec.evaluation_batch_size
    return TrainingArguments(**{**arguments, **overrides})


def stock_trainer(
    built: Built,
    spec: RunSpec,
    dataset: Dataset,
    *,
    output_dir: str | Path,
    evaluation: Dataset | None = None,
    collate: Callable[[list[Any]], dict[str, Any]] = default_data_collator,
    callbacks: Sequence[TrainerCallback] = (),
    listener: Listener | None = None,
    **overrides: Any,
) -> Trainer:
    """A stock Trainer on a built model, ready for `.train()`. One Trainer a model and a process:
    a second on the same model would train without autocast (it keeps `_is_accelerate_prepared`).

    dataset: of samples {"input_ids", "labels", ...} that `collate` stacks; listener: told the
    phases of each step; overrides: TrainingArguments of this run alone.
    """
    arguments = training_arguments(spec, output_dir, on_cpu=built.device.type == "cpu", **overrides)
    trainer = Trainer(
        model=built.model,
        args=arguments,
        train_dataset=dataset,
        eval_dataset=evaluation,
        data_collator=collate,
        callbacks=list(callbacks),
    )
    return instrument(trainer, listener) if listener else trainer
