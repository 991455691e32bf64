"""The GPU data against what its figures must satisfy, and against readings it did not come from."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import planner.devices as devices
from planner.cards import card_rows
from planner.cli import main
from planner.devices import all_devices, any_card, find_device, identify, local_device
from planner.errors import InputError
from planner.estimate import estimate
from planner.prices import read_prices
from planner.units import GIB, MIB
from tests.planner.tiny import tiny_spec

DATA = json.loads((Path(devices.__file__).parent / "data" / "devices.json").read_text())

# What torch.cuda.get_device_name() and nvidia-smi print, from users' own reports.
TORCH_NAMES = {
    "NVIDIA GeForce RTX 3090": "rtx-3090",
    "GeForce RTX 2080 Ti": "rtx-2080-ti",
    "NVIDIA GeForce RTX 4090": "rtx-4090",
    "NVIDIA GeForce RTX 5090": "rtx-5090",
    "NVIDIA GeForce RTX 4070 Ti SUPER": "rtx-4070-ti-super",
    "NVIDIA GeForce RTX 3080 Ti Laptop GPU": "rtx-3080-ti-laptop",
    "NVIDIA GeForce RTX 4090 Laptop GPU": "rtx-4090-laptop",
    "NVIDIA TITAN RTX": "titan-rtx",
    "Quadro RTX 8000": "quadro-rtx-8000",
    "NVIDIA RTX A6000": "rtx-a6000",
    "NVIDIA RTX 6000 Ada Generation": "rtx-6000-ada",
    "NVIDIA RTX PRO 6000 Blackwell Workstation Edition": "rtx-pro-6000-blackwell",
    "Tesla P100-PCIE-16GB": "p100-16gb",
    "Tesla V100-SXM2-32GB": "v100-32gb-sxm",
    "Tesla T4": "t4",
    "NVIDIA A10G": "a10g",
    "NVIDIA A100-SXM4-40GB": "a100-40gb-sxm",
    "NVIDIA A100 80GB PCIe": "a100-80gb-pcie",
    "NVIDIA L4": "l4",
    "NVIDIA L40S": "l40s",
    "NVIDIA H100 80GB HBM3": "h100-80gb-sxm",
    "NVIDIA H100 PCIe": "h100-80gb-pcie",
    "NVIDIA H200": "h200",
    "NVIDIA B200": "b200",
}

# Capacities torch printed in users' out-of-memory messages that the data file does not use.
OTHER_READINGS_GIB = [
    ("rtx-4090", 23.68),  # zai-org/CogVideo issue 36
    ("a100-40gb-sxm", 39.50),  # TianheWu/CoSeR issue 10
    ("a100-80gb-sxm", 79.25),  # HiDream-ai/VAREdit issue 6
    ("v100-32gb-sxm", 31.75),  # google/dynibar issue 8
    ("t4", 14.74),  # zai-org/CogVideo issue 741
    ("l40s", 44.53),  # Wan-Video/Wan2.1 issue 205
    ("rtx-6000-ada", 50_865_307_648 / GIB),  # unslothai/unsloth-zoo pull 1053, ECC off
    ("rtx-5090", 33_677_180_928 / GIB),  # aikitoria/open-gpu-kernel-modules issue 1
    ("rtx-pro-6000-blackwell", 95.59),  # pytorch/pytorch issue 182286
]


def test_data_holds_forty_five_cards_of_every_kind() -> None:
    ids = [device.id for device in all_devices()]
    assert len(ids) == len(set(ids)) >= 45
    architectures = {device.architecture for device in all_devices()}
    assert architectures == {
        "pascal", "volta", "turing", "ampere", "ada", "hopper", "blackwell"
    }  # fmt: skip
    assert sum("Laptop" in device.name for device in all_devices()) >= 5


@pytest.mark.parametrize("device", all_devices(), ids=lambda d: d.id)
def test_every_figure_is_positive_and_sourced_or_marked(device: devices.Device) -> None:
    assert min(device.sm_count, device.bandwidth_bytes_per_s, device.fp32_flops_per_s) > 0
    assert 0.85 * device.marketed_bytes < device.total_bytes < device.marketed_bytes
    figures = {"sm_count", "bandwidth", "fp32", "compute_capability", "total", "fp16"}
    assert figures <= device.sources.keys()
    for figure, source in device.sources.items():
        if source == devices.BOUND:
            assert figure == "total"
        elif source == devices.UNREAD:
            assert not device.verified
        else:
            assert "http" in source or source.startswith("measured by this project")


@pytest.mark.parametrize("device", all_devices(), ids=lambda d: d.id)
def test_rates_are_dense_and_ordered(device: devices.Device) -> None:
    rates = [device.fp32_flops_per_s, device.tf32_flops_per_s, device.fp16_flops_per_s]
    known = [rate for rate in rates if rate is not None]
    assert known == sorted(known)
    assert device.bf16_flops_per_s in (None, device.fp16_flops_per_s)
    if device.supports_int8_tensor:
        assert (device.int8_flops_per_s or 0) >= 1.9 * device.fp16_flops_per_s
    # A rate read with sparsity, or of fp16 accumulation, is twice what the chip's ratio allows.
    ratio = next(DATA["chips"][e["chip"]]["fp16"] for e in DATA["devices"] if e["id"] == device.id)
    assert device.fp16_flops_per_s / device.fp32_flops_per_s < 1.12 * ratio


@pytest.mark.parametrize("entry", DATA["devices"], ids=lambda e: e["id"])
def test_fp32_rate_implies_a_clock_that_exists(entry: dict[str, object]) -> None:
    """FLOP/s = multiprocessors x lanes x 2 x clock ties three figures from separate pages."""
    lanes = DATA["chips"][entry["chip"]]["fp32_lanes"]
    clock_mhz = float(str(entry["fp32_tflops"])) * 1e6 / (int(str(entry["sm_count"])) * lanes * 2)
    assert 1200 < clock_mhz < 2700


@pytest.mark.parametrize(("device", "reading_gib"), OTHER_READINGS_GIB)
def test_total_is_no_more_than_other_users_cards_report(device: str, reading_gib: float) -> None:
    assert find_device(device).total_bytes <= (reading_gib + 0.005) * GIB


@pytest.mark.parametrize(
    "entry", [e for e in DATA["devices"] if "total_bytes" in e], ids=lambda e: e["id"]
)
def test_bound_on_capacity_holds_wherever_it_was_read(entry: dict[str, object]) -> None:
    bound = DATA["total_bound"][entry["memory"]] * int(str(entry["marketed_gib"])) * GIB
    assert bound <= int(str(entry["total_bytes"]))


@pytest.mark.parametrize(("name", "expected"), TORCH_NAMES.items())
def test_names_torch_prints_resolve(name: str, expected: str) -> None:
    assert find_device(name).id == expected


@pytest.mark.parametrize("device", all_devices(), ids=lambda d: d.id)
def test_every_alias_finds_its_card_or_lists_it(device: devices.Device) -> None:
    assert find_device(device.id) is device
    for name in (device.name, device.label, *device.aliases):
        sharing = [d for d in all_devices() if name in (d.name, *d.aliases)]
        if len(sharing) <= 1:
            assert find_device(name) is device
            continue
        with pytest.raises(InputError, match="is several cards") as caught:
            find_device(name)
        assert all(other.id in str(caught.value) for other in sharing)


@pytest.mark.parametrize("name", ["RTX 3090", "3090", "rtx-3090", "GEFORCE_RTX_3090", " rtx3090 "])
def test_name_is_found_however_it_is_written(name: str) -> None:
    assert find_device(name).id == "rtx-3090"


def test_ambiguous_name_lists_the_cards() -> None:
    with pytest.raises(InputError, match=r"a100-40gb-pcie.*a100-80gb-sxm") as caught:
        find_device("A100")
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="rtx-4060-ti-8gb, rtx-4060-ti-16gb"):
        find_device("NVIDIA GeForce RTX 4060 Ti")


def test_unknown_name_tells_the_nearest() -> None:
    with pytest.raises(InputError, match="did you mean 'rtx-3090'"):
        find_device("RTX 3091")
    with pytest.raises(InputError, match="--memory"):
        find_device("toaster")
    with pytest.raises(InputError):
        find_device("")


def test_limits_tell_what_old_cards_cannot_do() -> None:
    turing, pascal, ampere = (find_device(name) for name in ("t4", "p100", "rtx-3090"))
    assert not turing.supports_bf16
    assert turing.supports_int8_tensor
    assert any("bf16" in text for text in turing.limits)
    assert any("int8" in text for text in pascal.limits)
    assert ampere.limits == ()
    assert turing.matmul_flops_per_s("bf16") == turing.fp32_flops_per_s


def test_local_card_is_recognised_by_name_and_size() -> None:
    assert identify("NVIDIA GeForce RTX 4060 Ti", 16_380 * MIB, (8, 9)).id == "rtx-4060-ti-16gb"
    assert identify("NVIDIA GeForce RTX 3080", 12_288 * MIB, (8, 6)).id == "rtx-3080-12gb"
    h200 = identify("NVIDIA H200", 143_155 * MIB, (9, 0))
    assert (h200.id, h200.total_bytes, h200.total_source) == ("h200", 143_155 * MIB, "NVML")


def test_unknown_local_card_keeps_its_own_size_and_is_unverified() -> None:
    card = identify("NVIDIA RTX 9999", 40_000 * MIB, (8, 9))
    assert (card.id, card.total_bytes, card.verified) == ("nvidia-rtx-9999", 40_000 * MIB, False)
    assert card.supports_fp8
    assert "slowest known" in card.note


def test_local_device_is_none_or_a_card_and_loads_no_torch() -> None:
    assert local_device() is None or local_device().total_bytes > GIB  # type: ignore[union-attr]
    code = (
        "import sys, planner.devices as d; d.find_device('h200'); d.local_device();"
        "print(int(any(m in sys.modules for m in ('torch', 'transformers', 'pandas'))))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "0"


def test_prices_are_read_by_any_name(tmp_path: Path) -> None:
    file = tmp_path / "prices.toml"
    file.write_text('"RTX 3090" = 0.22\nh200 = 3\n')
    assert read_prices(str(file)) == {"rtx-3090": 0.22, "h200": 3.0}
    file.write_text('toaster = 1\nh200 = -1\n"rtx-3090" = 1\n"3090" = 2\n')
    with pytest.raises(InputError) as caught:
        read_prices(str(file))
    assert len(caught.value.problems) == 3
    with pytest.raises(InputError, match="no such file"):
        read_prices(str(tmp_path / "none.toml"))


@pytest.mark.parametrize("gib", [4, 8, 23.2, 40, 80, 300])
def test_any_card_is_no_better_than_those_of_its_size(gib: float) -> None:
    size = int(gib * GIB)
    card = any_card(size)
    nearest = min(all_devices(), key=lambda d: abs(d.total_bytes - size)).marketed_bytes
    like = [d for d in all_devices() if d.marketed_bytes == nearest]
    like = [d for d in like if d.compute_capability >= (8, 0)] or like
    assert card.total_bytes == size
    assert not card.verified
    for device in like:
        assert card.fp16_flops_per_s <= device.fp16_flops_per_s
        assert card.sm_count >= device.sm_count
        assert card.compute_capability >= device.compute_capability


def test_memory_alone_names_a_card(capsys: pytest.CaptureFixture[str], tiny: str) -> None:
    arguments = ["fit", tiny, "--memory", "23.2GiB", "--json"]
    assert main(arguments) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["device_total_bytes"] == int(23.2 * GIB)
    assert any("no card is named" in note for note in answer["notes"])
    known = estimate(tiny_spec(tiny, device="rtx-3090", device_memory="23.2GiB"))
    assert answer["allocator_required_bytes"] == known.allocator_required_bytes


def test_memory_does_not_enlarge_every_card(tiny: str) -> None:
    rows = card_rows(tiny_spec(tiny, device_memory="40GiB"))
    assert all(row.fit.total_bytes == row.device.total_bytes for row in rows)
