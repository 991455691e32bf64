# ruff: noqa: T201 (a script)
"""`python -m probes.outlier_columns`: in how many input columns of each `down_proj` bitsandbytes
finds an outlier in a step with 8-bit random weights, a JSON line a shape. Needs the card."""

from __future__ import annotations

import json
import sys
from typing import Any

from planner.spec import spec_from_mapping

SHAPES = {
    "facebook/chameleon-7b": ((1, 512), (1, 1024), (4, 512), (2, 2048)),
    "meta-llama/Llama-2-7b-hf": ((1, 512), (4, 1024)),
    "Qwen/Qwen2.5-1.5B": ((1, 512), (4, 512)),
    "google/gemma-2b": ((1, 512), (2, 1024)),
    "google/gemma-2-2b": ((1, 512), (2, 1024)),
}


def main() -> int:
    """Count, model after model."""
    for model, shapes in SHAPES.items():
        for line in counted(model, shapes):
            print(json.dumps(line), flush=True)
    return 0


def counted(model: str, shapes: tuple[tuple[int, int], ...]) -> list[dict[str, Any]]:
    """The rows of one load."""
    import bitsandbytes.functional as functional
    import torch

    from probes import loading
    from probes.configs import config_for
    from probes.harness import Session
    from probes.meters import open_meter
    from probes.phases import PhaseClock
    from probes.workload import runner_for

    found: list[tuple[int, int]] = []
    quantize = functional.int8_vectorwise_quant

    def counting(A: torch.Tensor, threshold: float = 0.0) -> Any:
        made = quantize(A, threshold=threshold)
        if threshold > 0 and made[2] is not None:
            found.append((A.shape[-1], made[2].numel()))
        return made

    functional.int8_vectorwise_quant = counting
    meter, session, rows = open_meter(False), None, []
    try:
        for batch, length in shapes:
            spec = spec_from_mapping({
                "model": model, "quantization": "int8", "micro_batch_size": batch,
                "sequence_length": length, "gradient_checkpointing": True,
            })  # fmt: skip
            if session is None:
                session = Session(spec, config_for(model, tiny=False), meter)
            assert session.base is not None
            built = loading.adapt(session.base, spec, meter.device)
            runner = runner_for(built)
            found.clear()
            runner.run(PhaseClock(meter), 1)
            width = max(features for features, _ in found)
            columns = [count for features, count in found if features == width]
            rows.append({
                "model": model, "micro_batch_size": batch, "sequence_length": length,
                "in_features": width, "columns": columns[: len(columns) // 2],  # the rest: again
            })  # fmt: skip
            session._strip(built, runner)
            meter.release()
    finally:
        functional.int8_vectorwise_quant = quantize
    return rows


if __name__ == "__main__":
    sys.exit(main())
