"""From a run spec and a card to the answer: bytes at each instant, seconds, and a verdict."""

# Annotations stay objects here: named tuples would compile each string at import.
from collections.abc import Callable, Iterable
from functools import partial
from typing import NamedTuple, TypeVar

from planner.answer import Estimate, Parameters
from planner.devices import Device, any_card, find_device, local_device
from planner.dtypes import DType
from planner.errors import InputError, Problem, VramwiseError
from planner.host import HostMemory, HostNeeds, host_memory, largest_parameters
from planner.interval import Interval, requirement_interval
from planner.memory.loading import adapter_parameters
from planner.memory.optimizers import find_optimizer
from planner.memory.program import Program, evaluation_run, load, run
from planner.memory.requirement import reserve
from planner.memory.terms import Term, live_terms, static_terms
from planner.memory.workspace import (
    HANDLES_TRAINING,
    cublas_workspace_bytes,
)
from planner.models.registry import Model, load_model
from planner.non_torch import NonTorch, non_torch
from planner.notes import notes
from planner.spec import RunSpec
from planner.throughput.model import StepTime, step_time
from planner.verdict import Verdict, verdict, worst

MOST_TOKENS = 1 << 31  # of one forward: beyond any machine, and where 32-bit indices end


def estimate(spec: RunSpec) -> Estimate:
    """Answer a run spec. Raises InputError or UnsupportedError; never guesses."""
    model, device = resolve(spec)
    program = run(spec, model)
    return assemble(spec, model, device, program)


def resolve(spec: RunSpec) -> tuple[Model, Device]:
    """The spec's model and card. What is wrong with either, with the optimizer, or with what is
    asked of the model, is told at once."""
    errors: list[VramwiseError] = []
    model = _noting(errors, partial(load_model, spec.model))
    device = _noting(errors, partial(device_of, spec))
    _noting(errors, partial(find_optimizer, spec.optimizer))
    if model is not None:
        _noting(errors, partial(check, spec, model))
        _noting(errors, partial(load, spec, model))
    if model is None or device is None or errors:
        raise (
            errors[0]
            if len(errors) == 1
            else InputError(problem for error in errors for problem in _problems(error))
        )
    return model, device


T = TypeVar("T")


def _noting(errors: list[VramwiseError], find: Callable[[], T]) -> T | None:
    """What `find` finds; where it raises, None, and the error is noted."""
    try:
        return find()
    except VramwiseError as error:
        errors.append(error)
    return None


def _problems(error: VramwiseError) -> Iterable[Problem]:
    if isinstance(error, InputError):
        return error.problems
    field, _, message = str(error).partition(": ")
    return (Problem(field, message),)


class Requirement(NamedTuple):
    """What a program needs of torch's allocator on a kind of card. All in bytes.

    workspace_bytes: one cuBLAS handle's; required_bytes: the smallest cap for the whole run.
    """

    workspace_bytes: int
    resident_bytes: int
    peak_allocated_bytes: int
    peak_reserved_bytes: int
    load_peak_bytes: int
    eval_peak_bytes: int | None
    required_bytes: int
    interval: Interval


class Fit(NamedTuple):
    """A requirement held against one card: bytes, verdict and time of an optimizer step."""

    outside: NonTorch
    low_bytes: int
    high_bytes: int
    total_bytes: int
    device_verdict: Verdict
    host: HostMemory
    speed: StepTime
    tokens_per_second: float

    @property
    def verdict(self) -> Verdict:
        """The worse of the card's and the host's."""
        return worst(self.device_verdict, self.host.verdict)


def requirement(spec: RunSpec, model: Model, program: Program, workspace_bytes: int) -> Requirement:
    """The requirement of a program already run. Cards differ in it by their workspace alone."""
    # the lean recipes switch expandable segments on (recipes.build, allocator_settings)
    expandable = spec.expandable_segments or spec.stack == "lean"
    evaluation = evaluation_run(spec, model) if spec.evaluation_batch_size else None
    needs = reserve(program, workspace_bytes, expandable, evaluation)
    eval_peak = None
    if evaluation is not None:
        held = max(instant.peak_bytes for instant in evaluation.instants)
        above = held + HANDLES_TRAINING * workspace_bytes
        eval_peak = needs.resident_bytes + program.states.device_bytes + above
    required = max(needs.required_bytes, needs.load_peak_bytes, eval_peak or 0)
    interval = requirement_interval(spec, model, required)
    return Requirement(
        workspace_bytes, needs.resident_bytes, needs.peak_allocated_bytes,
        needs.peak_reserved_bytes, needs.load_peak_bytes, eval_peak, required, interval,
    )  # fmt: skip


def fit_on(spec: RunSpec, device: Device, program: Program, needed: Requirement) -> Fit:
    """A requirement against `device` (or the spec's own device_memory)."""
    outside = non_torch(device, spec, program.states.paged_bytes)
    total = spec.device_memory or device.total_bytes
    low = needed.interval.low_bytes + outside.low_bytes
    high = needed.interval.high_bytes + outside.high_bytes
    speed = step_time(spec, device, program.work)
    tokens = spec.micro_batch_size * spec.sequence_length * spec.gradient_accumulation_steps
    return Fit(
        outside, low, high, total, verdict(low, high, total), host_of(spec, device, program),
        speed, tokens / speed.step_s,
    )  # fmt: skip


def host_of(spec: RunSpec, device: Device, program: Program) -> HostMemory:
    """Host memory of a program already run."""
    tree, states = program.loaded.tree, program.states
    trained = trainable_parameters(program)
    itemsize = DType(spec.weights_dtype).itemsize if spec.method == "full" else 4  # adapters: fp32
    needs = HostNeeds(
        states.host_bytes, states.paged_bytes, inputs_bytes(program), trained * itemsize,
        largest_parameters(tree),
    )  # fmt: skip
    return host_memory(spec, device, needs)


def inputs_bytes(program: Program) -> int:
    """Bytes of one batch, as it goes to the card."""
    recorder = program.recorder
    forward = next(i.start for i in recorder.instants if i.name == "forward")
    made = [recorder.blocks[index] for index in recorder.events[:forward] if index >= 0]
    inputs = [block for block in made if block.category == "inputs"]
    batches = sum(block.op == "input_ids" for block in inputs)  # those of all micro batches
    return sum(block.nbytes for block in inputs) // max(1, batches)


def assemble(spec: RunSpec, model: Model, device: Device, program: Program) -> Estimate:
    """The answer for a program already run."""
    workspace = cublas_workspace_bytes(device.compute_capability)
    needed = requirement(spec, model, program, workspace)
    fit = fit_on(spec, device, program, needed)
    work, count = program.work, spec.gradient_accumulation_steps
    speed, interval = fit.speed, needed.interval
    return Estimate(
        verdict=fit.verdict,
        model=model.id,
        device=device.label,
        parameters=Parameters(
            model.tree.total_parameters, trainable_parameters(program), model.tree.by_component()
        ),
        resident_bytes=needed.resident_bytes,
        load_peak_bytes=needed.load_peak_bytes,
        peak_allocated_bytes=needed.peak_allocated_bytes,
        peak_reserved_bytes=needed.peak_reserved_bytes,
        peak_instant=program.peak.name,
        eval_peak_bytes=needed.eval_peak_bytes,
        host_bytes=fit.host.bytes,
        host_low_bytes=fit.host.low_bytes,
        host_total_bytes=fit.host.total_bytes,
        host_verdict=fit.host.verdict,
        host_terms=fit.host.terms,
        device_verdict=fit.device_verdict,
        allocator_required_bytes=needed.required_bytes,
        allocator_required_interval_bytes=(interval.low_bytes, interval.high_bytes),
        non_torch_bytes=fit.outside.bytes,
        device_required_bytes=needed.required_bytes + fit.outside.bytes,
        device_required_interval_bytes=(fit.low_bytes, fit.high_bytes),
        device_total_bytes=fit.total_bytes,
        headroom_bytes=fit.total_bytes - fit.high_bytes,
        paged_bytes=program.states.paged_bytes,
        step_seconds=speed.step_s,
        step_seconds_interval=(
            speed.fastest_s,
            speed.slowest_s,
        ),
        tokens_per_second=fit.tokens_per_second,
        time=speed,
        flops_per_step=count * (work.micro_batch.flops_16bit + work.micro_batch.flops_fp32),
        launches_per_step=count * work.micro_batch.launches + work.optimizer.launches,
        instants=instant_peaks(program, HANDLES_TRAINING * workspace),
        terms=terms(program, HANDLES_TRAINING * workspace, needed.peak_allocated_bytes),
        basis=interval.basis,
        speed_basis=speed.basis,
        notes=tuple(notes(spec, model, device, fit.outside, interval)),
        spec=spec,
    )


def terms(program: Program, workspace_bytes: int, peak_bytes: int) -> tuple[Term, ...]:
    """Every byte at the peak, as named terms; they sum to `peak_bytes`."""
    peak = program.peak
    workspace = Term(
        "cuBLAS workspaces", "workspace", workspace_bytes, "the whole step",
        f"{HANDLES_TRAINING} handles x {workspace_bytes // HANDLES_TRAINING} B",
        "aten/src/ATen/cuda/CublasHandlePool.cpp",
    )  # fmt: skip
    blocks = program.recorder.live_at(peak.event)
    named = (*static_terms(program), workspace, *live_terms(blocks, peak.name))
    unsplit = peak_bytes - sum(term.bytes for term in named)
    remainder = Term(
        "unsplit remainders of blocks", "allocator", unsplit, peak.name,
        "allocated blocks less the tensors in them: a remainder up to 1 MiB is not split off",
        "c10/cuda/CUDACachingAllocator.cpp should_split",
    )  # fmt: skip
    return (*named, remainder)


def instant_peaks(program: Program, workspace_bytes: int) -> dict[str, int]:
    """Most bytes live in each named instant of the step."""
    peaks: dict[str, int] = {}
    base = program.static_bytes + workspace_bytes
    for instant in program.recorder.instants:
        if instant.name != "loaded":
            peaks[instant.name] = max(peaks.get(instant.name, 0), base + instant.peak_bytes)
    return peaks


def trainable_parameters(program: Program) -> int:
    """Elements that require a gradient."""
    if program.loaded.spec.method == "full":
        return program.loaded.tree.total_parameters
    return adapter_parameters(program.loaded)


def device_of(spec: RunSpec) -> Device:
    """The spec's card, or the local one, or any card of the spec's memory."""
    if spec.device is not None:
        return find_device(spec.device)
    local = local_device()
    if local is not None:
        return local
    if spec.device_memory is not None:
        return any_card(spec.device_memory)
    allowed = "--gpu NAME, see `vramwise gpus`, or any card by its size: --memory 23.2GiB"
    raise InputError(Problem("device", "is needed: no GPU is found here", allowed=allowed))


def check(spec: RunSpec, model: Model) -> None:
    """What the spec asks must be possible for the model."""
    for name in ("micro_batch_size", "evaluation_batch_size"):
        tokens = getattr(spec, name) * spec.sequence_length
        if tokens > MOST_TOKENS:
            message = (f"x sequence_length {spec.sequence_length} is {tokens:,} tokens in one "
                       "forward")  # fmt: skip
            raise InputError(
                Problem(name, message, getattr(spec, name), f"at most {MOST_TOKENS:,} tokens")
            )
    if not spec.images_per_sample:
        return
    per_image = model.image_tokens(spec.image_size)
    needed = per_image * spec.images_per_sample
    if needed > spec.sequence_length:
        raise InputError(
            Problem(
                "images_per_sample",
                f"{spec.images_per_sample} image(s) take {needed} tokens, more than the "
                f"sequence_length of {spec.sequence_length}",
                spec.images_per_sample,
                f"at most {spec.sequence_length // per_image} image(s), or sequence_length >= "
                f"{needed}",
            )
        )
