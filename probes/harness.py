"""One load, measured at several shapes, each as a fresh process would measure it.

`Session` loads once; `Session.measure` puts adapters on, runs the recipes' steps under the phase
clock, optionally bisects the smallest cap, and takes everything back. Runs in a child process.
"""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

from planner.spec import RunSpec
from probes import loading
from probes.capacity import smallest_cap
from probes.clean import drop_frames, remember, restore
from probes.driver import driver_use, host_rss_bytes
from probes.meters import Levels, Meter
from probes.phases import PhaseClock
from probes.records import Attempt, Capacity, Meters, Options, PhaseMeters
from probes.saved import SavedTensors
from probes.workload import Ran, Runner, runner_for
from recipes.build import Built

# Steps of a try under a cap: the first makes the optimizer states, the second holds them.
_ATTEMPT_STEPS = 2


class OutOfMemoryError(Exception):
    """The steps did not fit the device. One line of evidence."""


@dataclass(frozen=True, slots=True)
class Situation:
    """Where the process stands: its card, what others used of it before, how late it may get."""

    gpu_index: int = 0
    others_used_bytes: int = 0
    deadline: float | None = None


class Session:
    """A loaded base model and the meter of its device."""

    def __init__(
        self,
        spec: RunSpec,
        config: PretrainedConfig,
        meter: Meter,
        weights: str = "random",
        situation: Situation | None = None,
    ) -> None:
        self.meter, self.situation = meter, situation or Situation()
        started = time.monotonic()
        meter.reset_peaks()
        with _oom_as_evidence():
            self.base: PreTrainedModel | None = loading.load_base(
                spec, config, meter.device, weights
            )
        meter.synchronize()
        self.load_meters = _phase_of(meter.levels())
        self.load_seconds = time.monotonic() - started
        self.pristine = remember(self.base, values=False)
        gc.collect()
        gc.freeze()  # the model is permanent: collections need not walk it

    def measure(self, spec: RunSpec, options: Options, snapshot: str | None = None) -> Meters:
        """What the options ask of one spec. Raises OutOfMemoryError; the session can go on.

        snapshot: a path without suffix; CUDA's allocator history of two more steps goes there.
        """
        assert self.base is not None
        built: Built | None = None
        runner: Runner | None = None
        try:
            with _oom_as_evidence():
                built = loading.adapt(self.base, spec, self.meter.device)
                runner = runner_for(built)
                meters = self._measure(built, runner, options)
                if snapshot is not None and self.meter.device.type == "cuda":
                    self._snapshot(runner, snapshot)
                return meters
        finally:
            self._strip(built, runner)
            del built, runner
            self.meter.cap(None)
            self.meter.release()

    def _strip(self, built: Built | None, runner: Runner | None) -> None:
        """Adapters off, the base as it was loaded. A full fine-tune has none."""
        if runner is not None:
            runner.close()
        if built is not None and built.model is not built.base:
            built.model.unload()  # type: ignore[operator]
        restore(self.pristine)

    def _measure(self, built: Built, runner: Runner, options: Options) -> Meters:
        self.meter.synchronize()
        resident = self.meter.levels()
        clock = PhaseClock(self.meter)
        retries, ooms = resident.retries, resident.ooms
        ran = self._run(runner, clock, options.steps)
        after = self.meter.levels()
        driver = driver_use(
            self.situation.gpu_index, self.situation.others_used_bytes, after.reserved
        ) if self.meter.device.type == "cuda" else None  # fmt: skip
        self._reset(runner)
        capacity = self._capacity(runner, clock, options) if options.bisect else None
        saved = self._saved(built, runner) if options.saved_tensors else None
        phases = {"load": self.load_meters, **clock.meters(options.warmup_steps)}
        peak, phase = clock.peak("allocated")
        rss, peak_rss = host_rss_bytes()
        return Meters(
            **_parameter_counts(built),
            resident_bytes=resident.allocated,
            resident_reserved_bytes=resident.reserved,
            phases=phases,
            peak_allocated_bytes=peak,
            peak_reserved_bytes=clock.peak("reserved")[0],
            peak_phase=phase,
            step_seconds=clock.step_seconds(options.warmup_steps),
            optimizer_steps=ran.optimizer_steps,
            optimizer_steps_skipped=ran.optimizer_steps_skipped,
            retries=after.retries - retries,
            ooms=after.ooms - ooms,
            driver=driver,
            host_rss_bytes=rss,
            host_peak_rss_bytes=peak_rss,
            saved_tensors_bytes=saved,
            capacity=capacity,
            losses=ran.losses,
        )

    def _run(self, runner: Runner, clock: PhaseClock, steps: int) -> Ran:
        """The steps, then a synchronised device."""
        try:
            return runner.run(clock, steps)
        finally:
            self.meter.synchronize()

    def _reset(self, runner: Runner) -> None:
        """As a fresh process: the model as it was, no optimizer, no cache, no workspace."""
        runner.reset()
        self.meter.release()
        self.meter.reset_peaks()

    def _capacity(self, runner: Runner, clock: PhaseClock, options: Options) -> Capacity | None:
        def attempt(cap_bytes: int, steps: int = _ATTEMPT_STEPS) -> Attempt:
            before = self.meter.levels().retries
            self.meter.cap(cap_bytes)
            try:
                with _oom_as_evidence():
                    self._run(runner, PhaseClock(self.meter), steps)
                passed = True
            except OutOfMemoryError:
                passed = False
            finally:
                self.meter.cap(None)
            retries = self.meter.levels().retries - before
            self._reset(runner)
            return Attempt(cap_bytes=cap_bytes, passed=passed, retries=retries)

        needed = max(t.peak_allocated for t in clock.tallies.values())
        reserved = max(t.peak_reserved for t in clock.tallies.values())
        return smallest_cap(
            attempt, needed, reserved,
            confirm=lambda cap: attempt(cap, options.steps),
            deadline=self.situation.deadline,
        )  # fmt: skip

    def _snapshot(self, runner: Runner, path: str) -> None:
        """torch's own format: https://pytorch.org/memory_viz opens it."""
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        torch.cuda.memory._record_memory_history(max_entries=1_000_000)
        try:
            self._run(runner, PhaseClock(self.meter), _ATTEMPT_STEPS)
            torch.cuda.memory._dump_snapshot(f"{path}.pickle")
        finally:
            torch.cuda.memory._record_memory_history(enabled=None)
            self._reset(runner)

    def _saved(self, built: Built, runner: Runner) -> dict[str, int]:
        saved = SavedTensors(built.model)
        with saved:
            self._run(runner, PhaseClock(self.meter), 1)
        self._reset(runner)
        return saved.by_module_type()


@contextlib.contextmanager
def _oom_as_evidence() -> Iterator[None]:
    """Turn torch's error into ours with no frame, hence no tensor, attached."""
    evidence = None
    try:
        yield
    except torch.OutOfMemoryError as error:
        evidence = drop_frames(error)
    except RuntimeError as error:
        # cuBLAS and cuDNN report exhausted memory as their own status.
        if "ALLOC_FAILED" not in str(error) and "out of memory" not in str(error):
            raise
        evidence = drop_frames(error)
    if evidence is not None:
        gc.collect()
        raise OutOfMemoryError(evidence.replace("\n", " ")[:600])


def _phase_of(levels: Levels) -> PhaseMeters:
    return PhaseMeters(
        peak_allocated_bytes=levels.peak_allocated,
        peak_active_bytes=levels.peak_active,
        peak_reserved_bytes=levels.peak_reserved,
        end_allocated_bytes=levels.allocated,
        end_reserved_bytes=levels.reserved,
        peak_inactive_split_bytes=levels.peak_inactive_split,
    )


def _parameter_counts(built: Built) -> dict[str, int]:
    """Base parameters (adapters apart), trainable ones, and the bytes all of them hold.

    A 4-bit weight holds two parameters a byte of its packed storage.
    """
    total = trainable = size = 0
    for name, parameter in built.model.named_parameters():
        packed = hasattr(parameter, "quant_state") and parameter.dtype == torch.uint8
        count: Any = parameter.numel() * (2 if packed else 1)
        size += parameter.numel() * parameter.element_size()
        trainable += count if parameter.requires_grad else 0
        total += count if "lora_" not in name else 0
    return {
        "parameters_total": int(total),
        "parameters_trainable": int(trainable),
        "parameters_bytes": size,
    }
