"""The lean stack traced, beside the stock one on the same tiny model."""

from __future__ import annotations

from typing import Any

from probes.dry.trace import trace
from tests.probes.dry.conftest import make_spec


def test_lean_holds_chunks_of_logits_and_frozen_parts_in_16_bits(llama: Any) -> None:
    llama.vocab_size = 32_768
    values = {"sequence_length": 2048, "micro_batch_size": 4, "lora": {"rank": 8}}
    stock, lean = (trace(make_spec(stack=s, **values), config=llama) for s in ("stock", "lean"))
    rows = {e.shape[0] for e in lean.events if e.shape[-1:] == (32_768,) and len(e.shape) == 2}
    assert rows
    assert max(rows) < 4 * 2048
    assert lean.resident_bytes < stock.resident_bytes
    assert lean.peak_allocated_bytes < stock.peak_allocated_bytes
    assert any("uncompiled" in name for name in lean.unknown_operations)
