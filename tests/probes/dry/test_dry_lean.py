"""The lean stack traced: beside the stock one on the same tiny model, and as compiled layers."""

from __future__ import annotations

import sys
from collections import Counter
from typing import Any

import pytest
import torch
import transformers

from probes.dry.compiled import Compiler
from probes.dry.events import Trace
from probes.dry.recorder import Recorder
from probes.dry.scope import Scope
from probes.dry.trace import trace
from tests.probes.dry.conftest import SHAPE, make_spec


@pytest.mark.slow
def test_lean_holds_chunks_of_logits_and_frozen_parts_in_16_bits(llama: Any) -> None:
    llama.vocab_size = 32_768
    values = {"sequence_length": 2048, "micro_batch_size": 4, "lora": {"rank": 8}}
    stock, lean = (trace(make_spec(stack=s, **values), config=llama) for s in ("stock", "lean"))
    rows = {e.shape[0] for e in lean.events if e.shape[-1:] == (32_768,) and len(e.shape) == 2}
    assert rows
    assert max(rows) < 4 * 2048
    assert lean.resident_bytes < stock.resident_bytes
    assert lean.peak_allocated_bytes < stock.peak_allocated_bytes
    assert lean.unknown_operations == ()


def _lean(config: Any, **values: Any) -> Trace:
    return trace(make_spec(stack="lean", sequence_length=512, **values), config=config)


@pytest.mark.slow
def test_a_layer_that_cannot_be_compiled_is_traced_uncompiled_and_named(
    llama: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = _lean(llama)

    def refuse(*_: Any) -> Any:
        raise NotImplementedError("no such kernel")

    monkeypatch.setattr("probes.dry.compiled.compile_graph", refuse)
    plain = _lean(llama)
    assert any("LlamaDecoderLayer traced uncompiled" in n for n in plain.unknown_operations)
    assert any("no such kernel" in n for n in plain.unknown_operations)
    saved = [_saved_between(t) for t in (compiled, plain)]
    assert saved[0] < saved[1]


@pytest.mark.slow
def test_a_torch_whose_compiler_has_other_names_is_told(
    llama: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "probes.dry.compiled", None)
    traced = _lean(llama)
    assert any("layers traced uncompiled" in name for name in traced.unknown_operations)


def _saved_between(traced: Trace) -> int:
    """Bytes that live from the second step's forward into its backward."""
    freed = {e.storage_id for e in traced.events if e.kind == "free" and e.phase == "backward"}
    return sum(
        e.size_bytes for e in traced.events
        if e.kind == "alloc" and e.step == 2 and e.phase == "forward" and e.storage_id in freed
    )  # fmt: skip


@pytest.mark.slow
def test_two_traces_are_alike(llama: Any) -> None:
    first, second = (_lean(llama, gradient_checkpointing=True) for _ in range(2))
    names = [
        [(e.kind, e.size_bytes, e.op, e.phase) for e in t.events if e.step == 2]
        for t in (first, second)
    ]
    assert names[0] == names[1]


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", ["Qwen2", "Qwen3", "Mistral", "Gemma2", "Gemma3Text", "Phi3"])
def test_layers_of_every_family_compile(family: str, checkpointing: bool) -> None:
    shape = {**SHAPE, "num_key_value_heads": 4, "pad_token_id": 0, "head_dim": 64}
    config = getattr(transformers, f"{family}Config")(**shape)
    traced = _lean(config, gradient_checkpointing=checkpointing)
    assert traced.unknown_operations == ()
    assert any(e.op.startswith("fused_") for e in traced.events)


def _block(x: Any, norm: Any, up: Any, down: Any) -> Any:
    """A norm, two products, a gate, a residual, and attention of 4 heads."""
    h = x.float()
    h = (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype) * norm
    q = h.view(*h.shape[:2], 4, -1).transpose(1, 2)
    a = torch.nn.functional.scaled_dot_product_attention(q, q * 2, q * 3, is_causal=True)
    h = x + a.transpose(1, 2).reshape(x.shape)
    return h + (torch.nn.functional.silu(h @ up) * (h @ up)) @ down


def _operands(device: str) -> list[torch.Tensor]:
    shapes = [(2, 128, 64), (64,), (64, 256), (256, 64)]
    made = [torch.ones(s, dtype=torch.bfloat16, device=device) for s in shapes]
    return [x.requires_grad_() for x in made]


def _kept(out: torch.Tensor) -> Counter[int]:
    """Bytes of each storage that a result's node keeps; states of random numbers left out."""
    node: Any = out.grad_fn
    kept = {x.untyped_storage()._cdata: x.untyped_storage().nbytes() for x in node.saved_tensors}
    return Counter(size for size in kept.values() if size > 16)


@pytest.mark.slow
def test_what_is_kept_is_what_torch_compiled_for_this_machine_keeps() -> None:
    torch._dynamo.reset()
    real = _kept(torch.compile(_block)(*_operands("cpu")))
    traced = _kept(_on_meta())
    assert traced == real
    assert traced


def _on_meta() -> torch.Tensor:
    recorder = Recorder(Scope())
    out: torch.Tensor = Compiler(recorder)(_block)(*_operands("meta"))
    assert not recorder.unknown
    return out
