"""Host memory of a run: what the process holds beside the card, and what the machine has.

A checkpoint in safetensors files is memory-mapped (transformers 5.17, modeling_utils.py
_load_pretrained_model, `backend="mmap"`): its pages are file cache, which the kernel takes back,
and count for nothing here. `data/host.json` holds what a process measured.
"""

# Annotations stay objects here: named tuples would compile each string at import.
import json
import re
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

from planner.devices import Device
from planner.dtypes import DType
from planner.memory.terms import Term
from planner.models.tree import ModelTree
from planner.spec import RunSpec
from planner.verdict import Verdict, verdict

_DATA = Path(__file__).with_name("data") / "host.json"
_MEMINFO = Path("/proc/meminfo")
LOADING_THREADS = 4  # core_model_loading.py GLOBAL_WORKERS; none while it quantises
SHARD_BYTES = 50 * 10**9  # save_pretrained's max_shard_size, "50GB"


class HostMemory(NamedTuple):
    """bytes: what to plan with, the upper bound; low_bytes: no less will do. total_bytes: what the
    machine has, None where that is not known. The terms of one instant, with those of the whole
    run, sum to `bytes`."""

    bytes: int
    low_bytes: int
    total_bytes: int | None
    verdict: Verdict | None
    terms: tuple[Term, ...]


class HostNeeds(NamedTuple):
    """What of a run lies in host memory, in bytes. paged_bytes: managed memory, which the driver
    moves to the host when the card is full; trained_bytes: of what a checkpoint's model file
    holds; largest: elements of the largest parameters, descending."""

    states_bytes: int
    paged_bytes: int
    inputs_bytes: int
    trained_bytes: int
    largest: tuple[int, ...]


def host_memory(spec: RunSpec, device: Device, needs: HostNeeds) -> HostMemory:
    """The process, what stays in host memory, and the largest of loading, batches and saving."""
    process = _process()
    throughout = [
        _term("process", process["high_bytes"], "the whole run", process["formula"],
              process["source"]),
        _term("optimizer states in host memory", needs.states_bytes, "the whole run",
              f"{spec.optimizer} keeps them there", "the optimizer's package"),
        _term("paged optimizer states", needs.paged_bytes, "when the card is full",
              "cudaMallocManaged: moved here when the card has no room",
              "bitsandbytes/functional.py get_paged"),
    ]  # fmt: skip
    moments = [
        _loading(spec, needs.largest),
        _term("batches", 2 * needs.inputs_bytes, "training", "a batch and its pinned copy",
              "transformers TrainingArguments.dataloader_pin_memory"),
        _term("checkpoint being written", min(needs.trained_bytes, SHARD_BYTES), "saving",
              "a model file of up to 50 GB is put together in host memory",
              "safetensors/torch.py _flatten_as_ptr, transformers save_pretrained"),
    ]  # fmt: skip
    most = max(moments, key=lambda term: term.bytes)
    kept = sum(term.bytes for term in throughout)
    low = process["low_bytes"] + needs.states_bytes + max(term.bytes for term in moments[1:])
    high = kept + most.bytes
    total = spec.host_memory or (_local_bytes() if device.total_source == "NVML" else None)
    told = None if total is None else verdict(low, high, total)
    shown = tuple(term for term in (*throughout, *moments) if term.bytes)
    return HostMemory(high, low, total, told, shown)


def _loading(spec: RunSpec, largest: tuple[int, ...]) -> Term:
    """A tensor of the checkpoint in another dtype is converted before it is copied to the card."""
    itemsize = DType(spec.weights_dtype).itemsize
    at_once = 1 if spec.quantization != "none" else LOADING_THREADS
    size = sum(largest[:at_once]) * itemsize
    formula = f"the {at_once} largest tensor(s) in {spec.weights_dtype}, at once"
    return _term("tensors on their way to the card", size, "loading", formula,
                 "transformers core_model_loading.py spawn_materialize")  # fmt: skip


@lru_cache(maxsize=4)
def largest_parameters(tree: ModelTree) -> tuple[int, ...]:
    """Elements of the largest parameters, descending."""
    sizes = [prod(shape) for module in tree.modules if not module.tied_to
             for _, shape in module.shapes]  # fmt: skip
    return tuple(sorted(sizes, reverse=True)[:LOADING_THREADS])


def _local_bytes() -> int | None:
    """MemTotal of this machine; None where there is no /proc/meminfo."""
    try:
        found = re.search(r"^MemTotal:\s+(\d+) kB", _MEMINFO.read_text(encoding="ascii"), re.M)
    except OSError:
        return None
    return int(found.group(1)) * 1024 if found else None


@lru_cache(maxsize=1)
def _process() -> dict[str, Any]:
    data: dict[str, Any] = json.loads(_DATA.read_text(encoding="utf-8"))["process"]
    return data


def _term(name: str, size: int, instant: str, formula: str, source: str) -> Term:
    return Term(name, "host", size, instant, formula, source)
