"""`vramwise fit --exact`: the real modelling code traced on the meta device, as a whole answer."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace

from planner.answer import Estimate
from planner.devices import Device
from planner.errors import MissingExtraError, UnsupportedError
from planner.estimate import check, device_of
from planner.interval import Interval
from planner.memory.program import run
from planner.models.registry import Model, load_model
from planner.non_torch import non_torch
from planner.notes import notes as planner_notes
from planner.spec import RunSpec
from planner.traced import Traced, traced_estimate


def exact_estimate(
    spec: RunSpec, *, trust_code: bool = False, model_class: str | None = None
) -> Estimate:
    """The answer with its memory traced instead of modelled, for any model of transformers.

    The time is the planner's model of the step's work: of its own program where it knows the
    family, else of the traced operations. Raises MissingExtraError without torch, InputError for a
    model that cannot be built. trust_code, model_class: code of the user's own that may run; the
    planner's formulas then say nothing of the model.
    """
    device = device_of(spec)
    model = None if trust_code or model_class else _known(spec)
    if model is not None:
        check(spec, model)
    traced = _trace(spec, device, trust_code, model_class)
    if model is None:
        return traced_estimate(spec, device, spec.model, traced)
    with suppress(UnsupportedError):  # a step that is not modelled: the traced work stands
        traced = replace(traced, work=run(spec, model).work)
    answer = traced_estimate(spec, device, model.id, traced)
    outside = non_torch(device, spec, traced.paged_bytes)
    told = planner_notes(spec, model, device, outside, Interval(0, 0, "traced"))
    return answer._replace(notes=(*answer.notes, *told))


def _known(spec: RunSpec) -> Model | None:
    """The planner's model, or None for a family that only transformers knows."""
    try:
        return load_model(spec.model)
    except UnsupportedError:
        return None


def _trace(spec: RunSpec, device: Device, trust: bool, model_class: str | None) -> Traced:
    try:
        from probes.dry.exact import traced_run
        from probes.dry.own import OwnCode
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing in ("planner", "probes", "recipes"):
            raise
        raise MissingExtraError("fit --exact", "train", missing) from None
    return traced_run(spec, device, OwnCode(trust, model_class))
