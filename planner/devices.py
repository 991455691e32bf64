"""GPUs as data: capacity, rates, what each can and cannot do, and where every figure was read.

`data/devices.json` holds the figures with their URLs. Rates are dense, never sparse. A rate that
no page states is the chip's documented ratio to its fp32 rate and says so in `sources`.
"""

# Annotations stay objects here: named tuples would compile each string at import.
import json
import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

from planner.errors import InputError, Problem, nearest_name
from planner.units import GIB, format_gib

Precision = Literal["fp32", "tf32", "fp16", "bf16", "int8"]
UNREAD, BOUND, RATIO = "unread", "bound", "chip ratio to fp32"
_DATA = Path(__file__).with_name("data") / "devices.json"


class Device(NamedTuple):
    """One GPU. Sizes in bytes, rates in bytes/s and FLOP/s (dense, a multiply-add is two).

    total_bytes: what the CUDA runtime, hence torch, reports (less than the marketed size);
    `total_source` is a URL, "bound" for a stated lower bound, or "NVML" for the local card.
    fp16_flops_per_s: tensor rate with fp32 accumulation (what training uses; half on GeForce).
    tf32/bf16/int8: None where the hardware has no such unit.
    sources: figure -> URL, "unread" where no page was read, or what it follows from.
    """

    id: str
    name: str
    aliases: tuple[str, ...]
    architecture: str
    compute_capability: tuple[int, int]
    sm_count: int
    marketed_bytes: int
    total_bytes: int
    total_source: str
    bandwidth_bytes_per_s: int
    fp32_flops_per_s: int
    tf32_flops_per_s: int | None
    fp16_flops_per_s: int
    bf16_flops_per_s: int | None
    int8_flops_per_s: int | None
    sources: Mapping[str, str]
    verified: bool
    note: str = ""

    @property
    def label(self) -> str:
        """The marketed name, with the memory where several sizes share it."""
        shared = sum(base_name(other.name) == base_name(self.name) for other in all_devices()) > 1
        size = f"{self.marketed_bytes // GIB}GB"
        return f"{self.name} {size}" if shared and size not in self.name else self.name

    @property
    def supports_bf16(self) -> bool:
        """bf16 in hardware: sm_80 and later. Before, torch emulates it in fp32, slowly."""
        return self.compute_capability >= (8, 0)

    @property
    def supports_flash_attention_2(self) -> bool:
        """The flash-attn 2 kernels: sm_80 and later (its README)."""
        return self.compute_capability >= (8, 0)

    @property
    def supports_int8_tensor(self) -> bool:
        """Int8 tensor cores, which bitsandbytes' int8 product needs: sm_75 and later."""
        return self.compute_capability >= (7, 5)

    @property
    def supports_fp8(self) -> bool:
        """fp8 tensor cores: sm_89 and later."""
        return self.compute_capability >= (8, 9)

    @property
    def has_tensor_cores(self) -> bool:
        return self.compute_capability >= (7, 0)

    @property
    def limits(self) -> tuple[str, ...]:
        """What the card cannot do, each a clause for the user."""
        told = (
            (self.has_tensor_cores, "has no tensor cores"),
            (self.supports_bf16, "emulates bf16 (use fp16)"),
            (self.supports_int8_tensor, "cannot run bitsandbytes int8"),
            (self.supports_flash_attention_2, "cannot run flash_attention_2 (use sdpa)"),
        )
        return tuple(text for able, text in told if not able)

    def matmul_flops_per_s(self, precision: Precision) -> int:
        """Peak dense rate of a matrix product; the fp32 rate where the precision is emulated."""
        rate: int | None = getattr(self, f"{precision}_flops_per_s")
        return rate or self.fp32_flops_per_s


def fold_name(name: str) -> str:
    """'NVIDIA GeForce RTX-3090' -> 'rtx3090': case, spaces, punctuation and vendor words off."""
    folded = re.sub(r"[^a-z0-9]|gpu", "", name.lower().replace("mobile", "laptop"))
    return re.sub(r"^(nvidia)?(geforce|tesla)?", "", folded)


def base_name(name: str) -> str:
    """The name the driver reports: without a memory size that only the shops add."""
    return re.sub(r" \d+GB$", "", name)


@lru_cache(maxsize=1)
def all_devices() -> tuple[Device, ...]:
    """Every known GPU, in the order of the data file."""
    data = json.loads(_DATA.read_text(encoding="utf-8"))
    return tuple(_device(entry, data) for entry in data["devices"])


def find_device(name: str) -> Device:
    """The device a name stands for: an id, an alias, or what torch and nvidia-smi print.

    Raises InputError: ambiguous names list their candidates, unknown ones name the nearest.
    """
    ids = _index().get(fold_name(name), ())
    if len(ids) == 1:
        return _by_id()[ids[0]]
    if ids:
        raise InputError(Problem("device", "is several cards", name, ", ".join(ids)))
    near = nearest_name(fold_name(name), _index()) if name.strip() else None
    nearest = ", ".join(_index()[near]) if near else None
    allowed = "an id that `vramwise gpus` lists, or any card by its size: --memory 23.2GiB"
    raise InputError(Problem("device", "is not a known GPU", name, allowed, nearest))


def local_device(index: int = 0) -> Device | None:
    """The local card through NVML, with its real capacity; None without pynvml, driver or card.

    Never loads torch or creates a CUDA context. A card that the data lacks becomes a Device of
    NVML's memory and compute capability with the rates of its slowest known like, unverified.
    """
    try:
        import pynvml  # part of the [train] extra
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
        try:
            handle = pynvml.nvmlDeviceGetHandleByIndex(index)
            name = pynvml.nvmlDeviceGetName(handle)
            memory = pynvml.nvmlDeviceGetMemoryInfo(handle, version=pynvml.nvmlMemory_v2)
            capability = tuple(pynvml.nvmlDeviceGetCudaComputeCapability(handle))
        finally:
            pynvml.nvmlShutdown()
    except (pynvml.NVMLError, AttributeError):
        return None
    text = name.decode() if isinstance(name, bytes) else str(name)
    # The CUDA runtime reports NVML's total less what the driver keeps for itself.
    return identify(text, int(memory.total) - int(memory.reserved), capability)


def identify(name: str, total_bytes: int, compute_capability: tuple[int, ...]) -> Device:
    """A card as NVML describes it -> the known Device of that name and size, or an unverified one
    with the rates of the slowest known card of its compute capability (or of any, if new)."""
    folded = fold_name(name)
    known = [d for d in all_devices() if fold_name(base_name(d.name)) == folded]
    known = known or [_by_id()[i] for i in _index().get(folded, ())]
    fitting = [d for d in known if abs(d.marketed_bytes - total_bytes) < 0.12 * d.marketed_bytes]
    if fitting:
        match = min(fitting, key=lambda d: abs(d.marketed_bytes - total_bytes))
        return match._replace(total_bytes=total_bytes, total_source="NVML")
    major, minor = (*compute_capability, 0, 0)[:2]
    like = [d for d in all_devices() if d.compute_capability == (major, minor)]
    slowest = min(like or all_devices(), key=lambda d: d.fp16_flops_per_s)
    return slowest._replace(
        id=re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-"), name=name, aliases=(),
        compute_capability=(major, minor), marketed_bytes=total_bytes, total_bytes=total_bytes,
        total_source="NVML", sources=dict.fromkeys(slowest.sources, UNREAD), verified=False,
        note=f"not in the data: rates of {slowest.name}, the slowest known of its kind",
    )  # fmt: skip


def any_card(total_bytes: int) -> Device:
    """A card known by its memory alone, to be safe: of the known cards of the nearest size (those
    with bf16 units where there are any) the slowest one's rates, the most multiprocessors
    (context) and the latest compute capability (library workspaces). Unverified."""
    nearest = min(abs(d.total_bytes - total_bytes) for d in all_devices())
    size = next(d.marketed_bytes for d in all_devices()
                if abs(d.total_bytes - total_bytes) == nearest)  # fmt: skip
    like = [d for d in all_devices() if d.marketed_bytes == size]
    like = [d for d in like if d.supports_bf16] or like
    slowest = min(like, key=lambda d: d.fp16_flops_per_s)
    return slowest._replace(
        id="any", name=f"card of {format_gib(total_bytes)}", aliases=(), architecture="",
        compute_capability=max(d.compute_capability for d in like),
        sm_count=max(d.sm_count for d in like), marketed_bytes=size, total_bytes=total_bytes,
        total_source="given", sources=dict.fromkeys(slowest.sources, UNREAD), verified=False,
        note=f"no card is named: speed is that of the slowest known of its size, {slowest.label}",
    )  # fmt: skip


def _device(entry: Mapping[str, Any], data: Mapping[str, Any]) -> Device:
    chip = data["chips"][entry["chip"]]
    rates = _rates(entry, chip)
    marketed = entry["marketed_gib"] * GIB
    total = entry.get("total_bytes", int(marketed * data["total_bound"][entry["memory"]]))
    major, minor = entry["compute_capability"].split(".")
    urls = data["sources"]
    sources = {figure: urls.get(key, key) for figure, key in entry["sources"].items()}
    for precision, rate in rates.items():
        if rate is not None:
            sources.setdefault(precision, f"{RATIO}: {urls[chip['source']]}")
    return Device(
        id=entry["id"], name=entry["name"], aliases=_aliases(entry),
        architecture=chip["architecture"], compute_capability=(int(major), int(minor)),
        sm_count=entry["sm_count"], marketed_bytes=marketed, total_bytes=total,
        total_source=sources["total"],
        bandwidth_bytes_per_s=round(entry["bandwidth_gb_s"] * 1e9),
        fp32_flops_per_s=round(entry["fp32_tflops"] * 1e12),
        tf32_flops_per_s=rates["tf32"], fp16_flops_per_s=rates["fp16"] or 0,
        bf16_flops_per_s=rates["bf16"], int8_flops_per_s=rates["int8"],
        sources=sources, verified=UNREAD not in sources.values(), note=entry.get("note", ""),
    )  # fmt: skip


def _rates(entry: Mapping[str, Any], chip: Mapping[str, Any]) -> dict[str, int | None]:
    """FLOP/s by precision: the published figure, else the chip's ratio to fp32."""
    rates: dict[str, int | None] = {}
    for precision in ("tf32", "fp16", "bf16", "int8"):
        published = entry.get("tflops", {}).get(precision)
        ratio = chip[precision]
        tflops = published or (ratio and ratio * entry["fp32_tflops"])
        rates[precision] = round(tflops * 1e12) if tflops else None
    return rates


def _aliases(entry: Mapping[str, Any]) -> tuple[str, ...]:
    short = [re.sub(r"^(rtx|gtx)-", "", entry["id"])] if "GeForce" in entry["name"] else []
    return (*entry.get("aliases", ()), *short)


@lru_cache(maxsize=1)
def _by_id() -> dict[str, Device]:
    return {device.id: device for device in all_devices()}


@lru_cache(maxsize=1)
def _index() -> dict[str, tuple[str, ...]]:
    """Folded name -> ids, the ids themselves first: an exact id is never ambiguous."""
    index: dict[str, tuple[str, ...]] = {}
    for device in all_devices():
        names: Iterable[str] = (device.name, *device.aliases)
        for folded in {fold_name(name) for name in names}:
            index[folded] = (*index.get(folded, ()), device.id)
    index.update({fold_name(device.id): (device.id,) for device in all_devices()})
    for device in all_devices():  # "rtx 4060 ti", without the size that tells two cards apart
        bare = re.sub(r"-\d+gb$", "", device.id)
        if bare != device.id and bare not in _by_id():
            key = fold_name(bare)
            listed = index.get(key, ())
            index[key] = listed if device.id in listed else (*listed, device.id)
    return index
