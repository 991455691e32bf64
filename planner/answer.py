"""The answer's contract: what `vramwise fit` and every view of it may read."""

# Annotations stay objects here: named tuples would compile each string at import.
from typing import Any, NamedTuple

from planner.interval import Basis
from planner.memory.terms import Term
from planner.spec import RunSpec, plain_values
from planner.throughput.model import StepTime
from planner.verdict import Verdict


class Parameters(NamedTuple):
    """Counts of elements. `total` is the base model, adapters apart (LaVIN's are part of it)."""

    total: int
    trainable: int
    by_component: dict[str, int]


class Estimate(NamedTuple):
    """What `vramwise fit` answers. All sizes in bytes, all times in seconds.

    resident_bytes: allocated after loading and adapter set-up, before the first step;
    peak_allocated_bytes: of training steps; allocator_required_bytes: the smallest cap on torch's
    caching allocator under which the run (loading, training, evaluation) completes;
    device_required_bytes: that plus non_torch_bytes, compared with device_total_bytes;
    host_bytes: of host memory, at least host_low_bytes, compared with host_total_bytes where that
    is known. verdict: the worse of device_verdict and host_verdict.
    """

    verdict: Verdict
    model: str
    device: str
    parameters: Parameters
    resident_bytes: int
    load_peak_bytes: int
    peak_allocated_bytes: int
    peak_reserved_bytes: int
    peak_instant: str
    eval_peak_bytes: int | None
    host_bytes: int
    host_low_bytes: int
    host_total_bytes: int | None
    host_verdict: Verdict | None
    host_terms: tuple[Term, ...]
    device_verdict: Verdict
    allocator_required_bytes: int
    allocator_required_interval_bytes: tuple[int, int]
    non_torch_bytes: int
    device_required_bytes: int
    device_required_interval_bytes: tuple[int, int]
    device_total_bytes: int
    headroom_bytes: int
    paged_bytes: int
    step_seconds: float
    step_seconds_interval: tuple[float, float]
    tokens_per_second: float
    time: StepTime
    flops_per_step: float
    launches_per_step: int
    instants: dict[str, int]
    terms: tuple[Term, ...]
    basis: Basis
    speed_basis: str
    notes: tuple[str, ...]
    spec: RunSpec

    def as_dict(self) -> dict[str, Any]:
        """A JSON-ready mapping, spec included."""
        values = {name: getattr(self, name) for name in self._fields if name != "spec"}
        values["parameters"] = self.parameters._asdict()
        values["time"] = self.time._asdict()
        values["terms"] = [term.as_dict() for term in self.terms]
        values["host_terms"] = [term.as_dict() for term in self.host_terms]
        values["spec"] = plain_values(self.spec)
        return values
