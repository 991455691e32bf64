"""The autocast policy against torch's own lists for CUDA, its cache against the source's rule."""

from __future__ import annotations

import sys
from types import ModuleType
from unittest import mock

import torch

from probes.dry.autocast import CudaSemantics
from probes.dry.policy import FLOAT32, LOWER, SET_DTYPE
from probes.dry.recorder import Recorder
from probes.dry.scope import Scope

_UTILS = ModuleType("common_utils")  # torch's needs a package that only its own tests install
_UTILS.TEST_WITH_ROCM, _UTILS.TestCase = False, object  # type: ignore[attr-defined]
with mock.patch.dict(sys.modules, {"torch.testing._internal.common_utils": _UTILS}):
    from torch.testing._internal.autocast_test_lists import AutocastTestLists

_LISTS = AutocastTestLists(torch.device("cpu"))


def _names(*lists: str) -> set[str]:
    return {entry[0] for name in lists for entry in getattr(_LISTS, name)}


def test_every_16_bit_operation_of_torchs_list_is_ours() -> None:
    known = _names("torch_fp16", "nn_fp16", "methods_fp16")
    inside = {"_thnn_fused_lstm_cell", "_thnn_fused_gru_cell", "cudnn_convolution",
              "cudnn_convolution_transpose", "linalg_vecdot", "linalg_multi_dot"}  # fmt: skip
    assert len(known) > 20
    assert known - inside <= LOWER


def test_every_fp32_operation_of_torchs_list_is_ours() -> None:
    known = _names("torch_fp32", "nn_fp32", "methods_fp32")
    assert len(known) > 30
    assert known <= FLOAT32 | SET_DTYPE


def test_rms_norm_is_one_kernel_that_keeps_a_float_a_row() -> None:
    recorder = Recorder(Scope())
    x = torch.empty(4, 8, 64, device="meta", dtype=torch.bfloat16, requires_grad=True)
    with recorder, CudaSemantics(recorder):
        out = torch.rms_norm(x, (64,))
        made = [(e.shape, e.dtype) for e in recorder.events if e.kind == "alloc"]
        out.sum().backward()
    assert made == [((4, 8, 64), "bfloat16"), ((4, 8, 1), "float32")]
    assert x.grad is not None


def test_only_a_trainable_fp32_leaf_is_cached() -> None:
    semantics = CudaSemantics(Recorder(Scope()))
    trainable = torch.empty(8, 8, device="meta", requires_grad=True)
    frozen = torch.empty(8, 8, device="meta")
    x = torch.empty(2, 8, device="meta")
    with semantics, semantics.autocast(torch.bfloat16):
        for weight in (trainable, trainable, frozen):
            assert torch.nn.functional.linear(x, weight).dtype is torch.bfloat16
        assert set(semantics._cache) == {id(trainable)}
        assert torch.softmax(x.bfloat16(), -1).dtype is torch.float32
        with semantics.without_autocast():
            assert torch.nn.functional.linear(x, frozen).dtype is torch.float32
        assert torch.is_autocast_enabled()
    assert not semantics._cache
    assert not torch.is_autocast_enabled()
