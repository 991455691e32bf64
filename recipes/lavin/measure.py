"""What a LaVIN's training step takes, measured: `python -m recipes.lavin.measure --size 7b`.

Builds at random weights on CUDA (on the CPU for `--size tiny` without one), runs a few optimizer
steps on random full-length samples and tells bytes and seconds. Running out of memory is an
outcome. `--cap` holds for everything from the first byte on; `--bisect` looks for the smallest cap
under which steps of the built model still complete, to 64 MiB or 1 %.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import resource
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from planner.errors import VramwiseError
from planner.spec import RunSpec, spec_from_mapping
from planner.units import MIB, format_gib, format_seconds, parse_bytes
from recipes.console import note, out
from recipes.lavin.build import BuiltLavin, build_lavin
from recipes.lavin.config import lavin_config
from recipes.lavin.step import LavinStep
from recipes.lavin.synthetic import random_batch
from recipes.phases import Phase

_NARROW_BYTES, _NARROW = 64 * MIB, 0.01
_WEIGHTS = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


def main(argv: list[str] | None = None) -> int:
    """Measure and print. 0 also where memory ran out; 2 for what cannot be run."""
    arguments = _parser().parse_args(argv)
    try:
        result = measure(arguments)
    except VramwiseError as error:
        note(f"error: {error}")
        return 2
    out(json.dumps(result) if arguments.json else _text(result))
    return 0


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """The measurement as a JSON-ready mapping; `outcome` is "ok" or "oom"."""
    spec = _spec(arguments)
    config = lavin_config(
        arguments.size, routing=arguments.routing, published_batch=arguments.published_batch
    )
    meter = Meter(arguments.device)
    meter.cap(arguments.cap)
    result: dict[str, Any] = {"outcome": "ok", **_settings(arguments, spec, meter)}
    began = time.perf_counter()
    try:
        built = build_lavin(spec, config, meter.device)
        result |= _counts(built, meter) | {"build_seconds": time.perf_counter() - began}
        step = LavinStep(built, arguments.steps, meter.phase)
        result |= _steps(step, meter, arguments.steps)
    except (torch.OutOfMemoryError, RuntimeError) as error:
        if "out of memory" not in str(error).lower():
            raise
        return result | meter.levels() | {"outcome": "oom", "during": meter.current,
                                          "error": str(error).splitlines()[0]}  # fmt: skip
    if arguments.bisect and meter.on_cuda:
        result |= smallest_cap(
            lambda cap: _passes(step, meter, cap), result["peak_allocated_bytes"],
            result["peak_reserved_bytes"],
        )  # fmt: skip
    return result


def smallest_cap(passes: Callable[[int], bool], low: int, high: int) -> dict[str, Any]:
    """Bisect between the peak allocated, below which no step can run, and the peak reserved. A
    `high` that fails (fragments) is raised a little at a time."""
    failed, tried = low, 0
    while not passes(high):
        failed, high, tried = high, int(high * 1.02) + _NARROW_BYTES, tried + 1
        if tried == 20:
            return {"allocator_required_bytes": None, "failed_cap_bytes": failed}
    while high - failed > max(_NARROW_BYTES, int(high * _NARROW)):
        middle, tried = (failed + high) // 2, tried + 1
        if passes(middle):
            high = middle
        else:
            failed = middle
    return {"allocator_required_bytes": high, "failed_cap_bytes": failed, "attempts": tried}


class Meter:
    """torch's caching allocator and the driver on a CUDA device; zeros on the CPU. Peaks of phases
    are kept apart: `phase` is a listener of `recipes.phases`."""

    def __init__(self, device: str | None) -> None:
        self.on_cuda = device != "cpu" and torch.cuda.is_available()
        self._others = _nvml_used()  # before this process has a context, on the card of index 0
        # a card by its index: the allocator's settings ask for one
        self.device = torch.device("cuda", 0) if self.on_cuda else torch.device(device or "cpu")
        if self.on_cuda and self.device.index is None:
            self.device = torch.device("cuda", torch.cuda.current_device())
        self.current = "build"
        self.phases: dict[str, int] = {}
        self.peak_allocated = self.peak_reserved = 0
        self.total_bytes = 0
        if self.on_cuda:
            self.total_bytes = torch.cuda.get_device_properties(self.device).total_memory

    def cap(self, cap_bytes: int | None) -> None:
        """Let the allocator take at most this from the driver."""
        if self.on_cuda:
            share = 1.0 if cap_bytes is None else min(1.0, cap_bytes / self.total_bytes)
            torch.cuda.set_per_process_memory_fraction(share, self.device)

    def phase(self, name: Phase, begins: bool) -> None:
        """Peaks of what lies between; told by the step."""
        if name == "step":
            return
        if begins:
            self.restart(name)
        else:
            self.phases[name] = max(self.phases.get(name, 0), self.keep())

    def restart(self, name: str) -> None:
        """Peaks from now on are `name`'s."""
        self.keep()
        self.current = name
        if self.on_cuda:
            torch.cuda.reset_peak_memory_stats(self.device)

    def keep(self) -> int:
        """Add the peaks since `restart` to the whole's; the peak allocated among them."""
        if not self.on_cuda:
            return 0
        peak = torch.cuda.max_memory_allocated(self.device)
        self.peak_allocated = max(self.peak_allocated, peak)
        reserved = torch.cuda.max_memory_reserved(self.device)
        self.peak_reserved = max(self.peak_reserved, reserved)
        return peak

    def synchronize(self) -> None:
        if self.on_cuda:
            torch.cuda.synchronize(self.device)

    def allocated(self) -> int:
        return torch.cuda.memory_allocated(self.device) if self.on_cuda else 0

    def levels(self) -> dict[str, Any]:
        """Bytes by torch and by the driver, and the host's peak."""
        self.keep()
        reserved = torch.cuda.memory_reserved(self.device) if self.on_cuda else 0
        used = _nvml_used()
        known = used is not None and self._others is not None and self.on_cuda
        return {
            "peak_allocated_bytes": self.peak_allocated, "peak_reserved_bytes": self.peak_reserved,
            "reserved_bytes": reserved,
            "peak_allocated_bytes_by_phase": dict(self.phases),
            "driver_used_bytes": used if self.on_cuda else 0,
            "non_torch_bytes": used - self._others - reserved if known else 0,  # type: ignore[operator]
            "host_peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        }  # fmt: skip

    def release(self) -> None:
        """Give cached segments and library workspaces back, as a fresh process has none."""
        gc.collect()
        if self.on_cuda:
            self.synchronize()
            torch._C._cuda_clearCublasWorkspaces()
            torch.cuda.empty_cache()


def _counts(built: BuiltLavin, meter: Meter) -> dict[str, Any]:
    meter.synchronize()
    parameters = sum(_logical(p) for p in built.model.parameters())
    trained = sum(p.numel() for p in built.model.trained_parameters().values())
    counts = {
        "parameters": parameters, "trainable_parameters": trained,
        "build_peak_allocated_bytes": meter.keep(),
    }  # fmt: skip
    meter.release()
    meter.peak_allocated = meter.peak_reserved = 0
    meter.restart("optimizer")
    return counts | {"resident_bytes": meter.allocated()}


def _logical(parameter: Any) -> int:
    """Elements of a weight; of a quantised one, those it stands for."""
    state = getattr(parameter, "quant_state", None)
    return int(torch.Size(state.shape).numel()) if state is not None else int(parameter.numel())


def _steps(step: LavinStep, meter: Meter, count: int) -> dict[str, Any]:
    losses, seconds = [], []
    for index in range(count):
        batches = _batches(step, index)
        meter.synchronize()
        began = time.perf_counter()
        losses.append(step.step(batches).item())
        meter.synchronize()
        seconds.append(time.perf_counter() - began)
    tokens = step.spec.micro_batch_size * step.spec.gradient_accumulation_steps
    usual = statistics.median(seconds[1:] or seconds)
    return meter.levels() | {
        "step_seconds": usual, "first_step_seconds": seconds[0],
        "tokens_per_second": tokens * step.spec.sequence_length / usual,
        "losses": losses, "after_step_allocated_bytes": meter.allocated(),
    }  # fmt: skip


def _batches(step: LavinStep, index: int) -> list[Any]:
    parts = step.spec.gradient_accumulation_steps
    return [
        random_batch(step.spec, step.built.config, index * parts + part) for part in range(parts)
    ]


def _passes(step: LavinStep, meter: Meter, cap: int, steps: int = 2) -> bool:
    """Whether the built model's steps complete under a cap, from a clean state."""
    meter.cap(None)
    step.optimizer.zero_grad(set_to_none=True)
    meter.release()
    meter.cap(cap)
    try:
        for index in range(steps):
            step.step(_batches(step, index))
        meter.synchronize()
        return True
    except (torch.OutOfMemoryError, RuntimeError) as error:
        if "out of memory" not in str(error).lower():
            raise
        return False
    finally:
        note(f"cap {format_gib(cap)}")


def _nvml_used() -> int | None:
    """Bytes in use on this process's first card by NVML, None without it."""
    try:
        import pynvml

        pynvml.nvmlInit()
        first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]  # NVML sees every card
        handle = pynvml.nvmlDeviceGetHandleByIndex(int(first))
        return int(pynvml.nvmlDeviceGetMemoryInfo(handle).used)
    except Exception:  # no module, no driver, no card
        return None


def _settings(arguments: argparse.Namespace, spec: RunSpec, meter: Meter) -> dict[str, Any]:
    device = torch.cuda.get_device_name(meter.device) if meter.on_cuda else "cpu"
    return {
        "model": spec.model, "quantization": spec.quantization, "precision": spec.precision,
        "micro_batch_size": spec.micro_batch_size, "sequence_length": spec.sequence_length,
        "images_per_sample": spec.images_per_sample,
        "gradient_accumulation_steps": spec.gradient_accumulation_steps,
        "gradient_checkpointing": spec.gradient_checkpointing, "optimizer": spec.optimizer,
        "attention": spec.attention, "routing": arguments.routing,
        "published_batch": arguments.published_batch, "cap_bytes": arguments.cap,
        "expandable_segments": spec.expandable_segments,
        "device": device, "device_total_bytes": meter.total_bytes, "torch": torch.__version__,
    }  # fmt: skip


def _spec(arguments: argparse.Namespace) -> RunSpec:
    return spec_from_mapping(
        {
            "model": f"lavin-{arguments.size}", "quantization": arguments.quantization,
            "double_quant": not arguments.no_double_quant, "precision": arguments.precision,
            "weights_dtype": _WEIGHTS[arguments.precision],
            "micro_batch_size": arguments.micro_batch_size,
            "sequence_length": arguments.sequence_length,
            "images_per_sample": arguments.images,
            "gradient_accumulation_steps": arguments.accumulation,
            "gradient_checkpointing": arguments.checkpointing,
            "optimizer": arguments.optimizer, "attention": arguments.attention,
            "expandable_segments": arguments.expandable_segments,
        }
    )  # fmt: skip


def _text(result: dict[str, Any]) -> str:
    lines = []
    for key, value in result.items():
        if isinstance(value, int) and key.endswith("_bytes"):
            lines.append(f"{key:<32}{value:>16,}  {format_gib(value)}")
        elif isinstance(value, float) and key.endswith("_seconds"):
            lines.append(f"{key:<32}{format_seconds(value):>16}")
        else:
            lines.append(f"{key:<32}{value if not isinstance(value, list) else value[-1]!s:>16}")
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m recipes.lavin.measure", description=__doc__)
    parser.add_argument("--size", default="7b", choices=["7b", "13b", "65b", "tiny"])
    parser.add_argument("--quantization", default="none", choices=["none", "nf4", "fp4"])
    parser.add_argument("--no-double-quant", action="store_true")
    parser.add_argument("--precision", default="bf16", choices=["bf16", "fp16", "fp32"])
    parser.add_argument("--micro-batch-size", type=int, default=1)
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--images", type=int, default=1, choices=[0, 1], help="pictures a sample")
    parser.add_argument("--accumulation", type=int, default=1, help="micro batches a step")
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--optimizer", default="adamw_torch")
    parser.add_argument("--attention", default="sdpa", choices=["sdpa", "eager"])
    parser.add_argument("--routing", default="outputs", choices=["outputs", "bottleneck"])
    parser.add_argument("--published-batch", action="store_true")
    parser.add_argument("--expandable-segments", action="store_true")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--cap", type=_size, help="bytes or 40GiB that the allocator may take")
    parser.add_argument("--bisect", action="store_true", help="look for the smallest cap")
    parser.add_argument("--device", help="cuda or cpu; default: what there is")
    parser.add_argument("--json", action="store_true", help="print one JSON line")
    return parser


def _size(text: str) -> int:
    try:
        return parse_bytes(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


if __name__ == "__main__":
    import sys

    sys.exit(main())
