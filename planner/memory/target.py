"""Which fused attention kernel torch chooses on a card: what a run of the step needs to know of it.

sdp_utils.cpp, check_prefer_cudnn_attention: cuDNN's on data-centre Hopper and Blackwell; else flash
"""

from __future__ import annotations

from functools import lru_cache

from planner.devices import find_device
from planner.spec import RunSpec

_FLASH_CARD = "rtx-4090"  # stands for every card without cuDNN's attention


def prefers_cudnn_attention(compute_capability: tuple[int, int]) -> bool:
    """Whether torch 2.11 takes cuDNN's attention before flash."""
    return compute_capability in ((9, 0), (10, 0))


def kernels_device(spec: RunSpec) -> str | None:
    """The card whose kernels the spec's card runs, for what is shared between cards; None stands
    for Hopper, and for a card that is not named."""
    if spec.device is None:
        return None
    return None if _is_cudnn(spec.device) else _FLASH_CARD


@lru_cache(maxsize=256)
def _is_cudnn(device: str) -> bool:
    return prefers_cudnn_attention(find_device(device).compute_capability)
