"""What to know before any GPU second is spent: findings about a run's data, cost and settings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import nn
from transformers import PretrainedConfig

from planner.models.lora import lora_parameters
from planner.models.registry import load_model
from planner.spec import RunSpec
from planner.units import format_gib, format_seconds
from recipes.data.batches import Batches
from recipes.data.encoding import IGNORED, Encoded

Severity = Literal["error", "warning", "note"]
_PAD_WASTE, _MANY_HOURS = 0.25, 24.0
# Trainer saves these beside an adapter that targets the head: its frozen base weight, in fp32
# after the k-bit preparation (peft's save_embedding_layers="auto").
_FP32_BYTES = 4


@dataclass(frozen=True, slots=True)
class Finding:
    """An error stops the run; a warning says what it costs; a note is good to know."""

    severity: Severity
    subject: str
    text: str

    def __str__(self) -> str:
        return f"{self.severity}: {self.subject}: {self.text}"


def check_samples(
    samples: Sequence[Encoded], config: PretrainedConfig, pad_id: int | None
) -> list[Finding]:
    """Labels: aligned with the ids they predict, padding and image positions masked, none empty."""
    masked = _image_ids(config)
    moved = sum(
        any(label not in (IGNORED, i) for i, label in zip(s.ids, s.labels, strict=True))
        for s in samples
    )
    images = sum(any(label in masked for label in s.labels) for s in samples)
    pads = sum(
        len(s.labels) > 1 and s.labels[-1] == s.labels[-2] == pad_id != IGNORED for s in samples
    )
    empty = sum(all(label == IGNORED for label in s.labels[1:]) for s in samples)
    cut = sum(s.truncated for s in samples)
    total = len(samples)
    found = []
    if moved:
        found.append(Finding("error", "labels", f"{moved} of {total} samples have labels that are "
                     "not their own token: the model would learn to map a position of the prompt "
                     "to a token of the answer"))  # fmt: skip
    if images:
        found.append(Finding("error", "labels", f"{images} of {total} samples train image "
                     "positions: Chameleon masks those logits, and the loss would be about 3e38 / "
                     "tokens, or the placeholder would be learned"))  # fmt: skip
    if pads:
        found.append(Finding("error", "labels", f"{pads} of {total} samples train padding"))
    if empty:
        found.append(Finding("error" if empty == total else "warning", "labels",
                     f"{empty} of {total} samples have nothing to learn (prompt longer than "
                     "sequence_length, or labels all -100)"))  # fmt: skip
    if cut:
        found.append(Finding("warning", "sequence_length", f"{cut} of {total} answers are cut"))
    return found


def check_padding(batches: Batches) -> list[Finding]:
    """Positions spent on padding."""
    share = batches.padded_share()
    if share <= _PAD_WASTE:
        return [Finding("note", "data.padding", f"{share:.0%} of positions are padding")]
    advice = "pad to the longest of a batch and group by length"
    return [Finding("warning", "data.padding", f"{share:.0%} of positions are padding: {advice}")]


def check_model(model: nn.Module, reached: int, layers: int) -> list[Finding]:
    """Trained parameters that get no gradient; how far back gradients reach."""
    found = []
    deaf = [n for n, p in model.named_parameters() if p.requires_grad and "vqmodel" in n]
    if deaf:
        found.append(Finding("warning", "method", f"{len(deaf)} tensors of the image tokenizer "
                     "are set to train and get no gradient (an argmin is behind)"))  # fmt: skip
    silent = [n for n, p in model.named_parameters() if p.requires_grad and p.numel() == 0]
    if silent:
        found.append(Finding("error", "method", f"{len(silent)} trained tensors are empty"))
    if not any(p.requires_grad for p in model.parameters()):
        found.append(Finding("error", "lora", "nothing is trained"))
    if reached < layers:
        found.append(Finding("note", "lora.target_modules", f"gradients reach {reached} of "
                     f"{layers} layers: the others run without a graph"))  # fmt: skip
    return found


def check_schedule(
    spec: RunSpec, steps: int, step_s: float | None, evaluation_s: float | None = None
) -> list[Finding]:
    """Hours of evaluation, disk of checkpoints, length of warm-up."""
    schedule, found = spec.schedule, []
    if schedule.evaluate_every_steps and (step_s or evaluation_s):
        times = steps // schedule.evaluate_every_steps
        one = evaluation_s if evaluation_s is not None else _evaluation_s(spec, step_s or 0.0)
        hours, train = times * one / 3600, steps * (step_s or 0.0) / 3600
        severity: Severity = "warning" if hours > max(1.0, train / 4) else "note"
        found.append(Finding(severity, "schedule.evaluate_every_steps", f"{times} evaluations of "
                     f"{format_seconds(one)} are {format_seconds(hours * 3600)} beside "
                     f"{format_seconds(train * 3600)} of training"))  # fmt: skip
    if schedule.warmup_steps and schedule.warmup_steps < steps // 1000:
        found.append(Finding("note", "schedule.warmup_steps", f"{schedule.warmup_steps} of {steps} "
                     "steps is hardly a warm-up"))  # fmt: skip
    if schedule.save_every_steps:
        saves, one_bytes = steps // schedule.save_every_steps, checkpoint_bytes(spec)
        size = saves * one_bytes
        severity = "warning" if size > 20 << 30 else "note"
        found.append(Finding(severity, "schedule.save_every_steps", f"{saves} checkpoints of "
                     f"{format_gib(one_bytes)} are {format_gib(size)} of disk"))  # fmt: skip
    return found


def checkpoint_bytes(spec: RunSpec) -> int:
    """Bytes of one checkpoint: trained parameters with Adam's two moments, and on the stock stack
    the head's base weight where the adapter targets it."""
    model = load_model(spec.model)
    if spec.method == "full":
        return 3 * _FP32_BYTES * model.tree.total_parameters
    trained = 3 * _FP32_BYTES * lora_parameters(model.tree, spec.lora)
    targets = spec.lora.target_modules
    head = not isinstance(targets, str) and "lm_head" in targets and spec.stack == "stock"
    return trained + head * _FP32_BYTES * model.text.vocab_size * model.text.hidden_size


def check_precision(spec: RunSpec, capability: tuple[int, int] | None) -> list[Finding]:
    """Formats the card lacks; formats that do not go together."""
    found = []
    if capability and capability < (8, 0) and spec.precision == "bf16":
        level = ".".join(map(str, capability))
        found.append(Finding("warning", "precision", "this card has no bf16 tensor cores "
                     f"(compute capability {level}): it is emulated, slowly"))  # fmt: skip
    if spec.precision == "fp16" and spec.weights_dtype == "bfloat16":
        found.append(Finding("warning", "precision", "fp16 autocast over weights published in "
                     "bfloat16 overflows above 65504; bf16 needs no loss scaling"))  # fmt: skip
    return found


def check_seed_habits(spec: RunSpec) -> list[Finding]:
    """What the seed's pipeline did that costs its result."""
    found = []
    data, judged = spec.data, spec.evaluation
    targets = spec.lora.target_modules
    if spec.method == "lora" and not isinstance(targets, str) and set(targets) == {"lm_head"}:
        found.append(Finding("warning", "lora.target_modules", "an adapter on lm_head alone "
                     "changes which words are said, not what the layers compute"))  # fmt: skip
        if spec.gradient_checkpointing and spec.stack == "stock" and set(targets) == {"lm_head"}:
            found.append(Finding("warning", "gradient_checkpointing", "no layer holds a trained "
                         "parameter, and checkpointing makes every layer run forward twice and "
                         "backward: switch it off (2.9 x the time on an H200)"))  # fmt: skip
    if data and data.padding == "max_length":
        found.append(Finding("warning", "data.padding", "every sample is padded to "
                     f"{spec.sequence_length} tokens"))  # fmt: skip
    if judged and judged.sample == "first":
        found.append(Finding("warning", "evaluation.sample", "the first questions of MMMLU are one "
                     "subject (abstract algebra, 100 rows): draw them stratified"))  # fmt: skip
    if judged and judged.choose == "generate":
        found.append(Finding("warning", "evaluation.choose", f"one token from {judged.beams} beams "
                     "gives words that are no letter (a quarter of the seed's answers); the "
                     "letters' probabilities give an answer to every question"))  # fmt: skip
    return found


def _evaluation_s(spec: RunSpec, step_s: float) -> float:
    """An evaluation's forward passes at a third of a training step's time a sample."""
    samples = spec.schedule.evaluation_samples or 0
    a_step = spec.micro_batch_size * spec.gradient_accumulation_steps
    return samples / a_step * step_s / 3


def _image_ids(config: PretrainedConfig) -> set[int]:
    mapping = getattr(config, "vocabulary_map", None) or {}
    return {i for name, i in mapping.items() if name.startswith("IMGIMG") or name == "<image>"}
