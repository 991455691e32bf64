"""What loading does to the allocator: `from_pretrained` of transformers 5, event by event.

First one block of the model's size is taken and given back (`caching_allocator_warmup`), so that
the weights are carved from it; then each tensor arrives in the order of its name, in its own dtype,
and is quantised on arrival (a quantised load is sequential: core_model_loading.py).
"""

from __future__ import annotations

from typing import Any

import torch
from bitsandbytes.nn.modules import Int8Params, Params4bit
from transformers import PreTrainedModel
from transformers.core_model_loading import dot_natural_key

from probes.dry.recorder import Recorder

EMPTY_CACHE = "empty_cache"


def load(recorder: Recorder, model: PreTrainedModel) -> None:
    """Record the arrival of every parameter and buffer of `model` (already built on meta)."""
    recorder.temporary("caching_allocator_warmup", warmup_bytes(model))
    named = dict(model.named_parameters())
    for path in sorted(named, key=dot_natural_key):
        with recorder.scope.inside(path.rpartition(".")[0]):
            _arrive(recorder, named[path])
    for path, buffer in model.named_buffers():
        with recorder.scope.inside(path.rpartition(".")[0]):
            recorder.track(buffer, "load")


def warmup_bytes(model: PreTrainedModel) -> int:
    """`get_total_byte_count`: half a byte a weight in 4 bits, one in 8, else its element size."""
    total = 0.0
    for parameter in model.parameters():
        if isinstance(parameter, Params4bit):
            total += parameter.quant_state.shape.numel() * 0.5
        else:
            total += parameter.numel() * parameter.element_size()
    for buffer in model.buffers():
        total += buffer.numel() * buffer.element_size()
    return int(total // 2) * 2


def _arrive(recorder: Recorder, parameter: torch.Tensor) -> None:
    if isinstance(parameter, Params4bit):
        _quantize_4bit(recorder, parameter)
    elif isinstance(parameter, Int8Params):
        _quantize_8bit(recorder, parameter)
    else:
        recorder.track(parameter, "load")


def _quantize_4bit(recorder: Recorder, parameter: Params4bit) -> None:
    """bitsandbytes/functional.py `quantize_4bit`: maxima in fp32, then (doubled) less their mean,
    in 8 bits; the 16-bit weight goes last."""
    state: Any = parameter.quant_state
    source = recorder.begin("load", state.shape.numel() * state.dtype.itemsize)
    op = "quantize_4bit"
    if not state.nested:
        recorder.track(state.absmax, op)
        recorder.track(parameter, op)
        recorder.track(state.code, op)
        recorder.end(source)
        return
    size = state.absmax.numel() * 4
    maxima = recorder.begin(op, size)
    recorder.track(parameter, op)
    recorder.track(state.code, op)
    recorder.track(state.offset, op)
    centred = recorder.begin(op, size)
    recorder.track(state.state2.code, op)
    recorder.track(state.state2.absmax, op)
    recorder.track(state.absmax, op)
    recorder.end(centred)
    recorder.end(maxima)
    recorder.end(source)


def _quantize_8bit(recorder: Recorder, parameter: Int8Params) -> None:
    """The weight returns to the host, comes back in its dtype, is turned to fp16 and quantised by
    rows (nn/modules.py `Int8Params._quantize`)."""
    count = parameter.numel()
    first = recorder.begin("load", count * 2)
    half = recorder.begin("int8_vectorwise_quant", count * 2)
    recorder.track(parameter.SCB, "int8_vectorwise_quant")
    recorder.track(parameter, "int8_vectorwise_quant")
    recorder.end(half)
    recorder.end(first)
