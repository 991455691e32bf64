"""The shadow engine against torch's own: what a real run on the CPU allocates and releases, told
by torch's profiler. No dispatch mode is active, so gradients are added in place as in training."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

from planner.dtypes import DType
from planner.memory import layers as nn
from planner.memory import vocabulary
from planner.memory.ops import Engine
from planner.memory.tensor import Tensor

ROWS, WIDTH, INNER = 64, 128, 256
F32, BF16 = DType.FLOAT32, DType.BFLOAT16


def memory_of(run: Callable[[], object]) -> tuple[int, int]:
    """(peak of the live bytes, bytes allocated in all) of a run on the CPU."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        kept = run()
    del kept
    live = peak = total = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() != "[memory]" or event.device_type() != DeviceType.CPU:
            continue
        size = event.nbytes()
        live += size
        if size >= 512:  # scalars are not the point
            total += size
        peak = max(peak, live)
    return peak, total


def planned(engine: Engine) -> tuple[int, int]:
    """The same of the shadow engine."""
    engine.recorder.enter("end")
    peak = max(instant.peak_bytes for instant in engine.recorder.instants)
    sizes = (block.nbytes for block in engine.recorder.blocks if block.shape != ())
    return peak, sum(sizes)


def leaf(*shape: int, trainable: bool = True) -> Tensor:
    """A parameter, outside what is counted."""
    return Tensor(None, shape, F32, requires_grad=trainable)


def weights() -> tuple[torch.Tensor, torch.Tensor]:
    return (torch.randn(INNER, WIDTH, requires_grad=True),
            torch.randn(WIDTH, INNER, requires_grad=True))  # fmt: skip


@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_checkpointed_block_allocates_as_torch_does(checkpointed: bool) -> None:
    up, down = weights()
    source, grad = torch.randn(ROWS, WIDTH, requires_grad=True), torch.randn(ROWS, WIDTH)

    def block(x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.silu(x @ up.T) @ down.T

    def real() -> None:
        hidden = block(source)
        hidden = (
            checkpoint(block, hidden, use_reentrant=False, preserve_rng_state=False)
            if checkpointed
            else block(hidden)
        )
        hidden.backward(grad)

    engine = Engine()
    shadow_up, shadow_down = leaf(INNER, WIDTH), leaf(WIDTH, INNER)

    def shadow_block(x: Tensor) -> Tensor:
        return nn.matmul(
            engine, engine.activation(nn.matmul(engine, x, shadow_up), "silu"), shadow_down
        )

    hidden = shadow_block(leaf(ROWS, WIDTH))
    hidden = engine.checkpoint(shadow_block, hidden) if checkpointed else shadow_block(hidden)
    engine.backward_with(hidden, leaf(ROWS, WIDTH))
    del hidden
    peak, total = memory_of(real)
    assert planned(engine) == (pytest.approx(peak, rel=1e-3), pytest.approx(total, rel=1e-3))


def test_a_second_gradient_is_added_in_place() -> None:
    source = torch.randn(ROWS, WIDTH, requires_grad=True)
    grad = torch.randn(ROWS, WIDTH)

    def real() -> None:
        hidden = torch.nn.functional.silu(source)
        hidden = torch.nn.functional.silu(hidden) + torch.nn.functional.silu(hidden)
        hidden.backward(grad)

    engine = Engine()
    hidden = engine.activation(leaf(ROWS, WIDTH), "silu")
    hidden = engine.add(engine.activation(hidden, "silu"), engine.activation(hidden, "silu"))
    engine.backward_with(hidden, leaf(ROWS, WIDTH))
    del hidden
    assert planned(engine) == memory_of(real)


def test_the_gradient_of_a_view_is_not_added_to_in_place() -> None:
    source = torch.randn(ROWS, 2, WIDTH, requires_grad=True)
    first, second = (torch.randn(WIDTH, WIDTH) for _ in range(2))
    grad = torch.randn(ROWS, 2, WIDTH)

    def real() -> None:
        hidden = torch.nn.functional.silu(source)
        left = torch.nn.functional.linear(hidden, first)
        hidden = left + torch.nn.functional.linear(hidden, second)
        del left
        hidden.backward(grad)

    engine = Engine()
    hidden = engine.activation(leaf(ROWS, 2, WIDTH), "silu")
    frozen = [leaf(WIDTH, WIDTH, trainable=False) for _ in range(2)]
    left = nn.matmul(engine, hidden, frozen[0])
    hidden = engine.add(left, nn.matmul(engine, hidden, frozen[1]))
    del left
    engine.backward_with(hidden, leaf(ROWS, 2, WIDTH))
    del hidden
    assert planned(engine) == memory_of(real)


def test_a_tied_weight_waits_for_all_its_gradients() -> None:
    table = torch.randn(512, WIDTH, requires_grad=True)
    ids = torch.randint(0, 512, (4, 8))
    grad = torch.randn(4, 8, 512)

    def real() -> None:
        rows = torch.nn.functional.embedding
        torch.nn.functional.linear(rows(ids, table), table).backward(grad)

    engine = Engine()
    shared, tokens = leaf(512, WIDTH), Tensor(None, (4, 8), DType.INT64)
    logits = nn.matmul(engine, vocabulary.embedding(engine, shared, tokens), shared)
    engine.backward_with(logits, leaf(4, 8, 512))
    del logits
    assert planned(engine)[0] == memory_of(real)[0]


def casts_of_a_weight_used_twice(trainable: bool) -> tuple[int, int]:
    """Bytes allocated by torch and by the engine. oneDNN's scratch is the same either way."""
    weight = torch.randn(WIDTH, WIDTH, requires_grad=trainable)
    source = torch.randn(ROWS, WIDTH, dtype=torch.bfloat16)

    def real() -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            linear = torch.nn.functional.linear
            return linear(linear(source, weight), weight)

    engine = Engine()
    shadow, x = leaf(WIDTH, WIDTH, trainable=trainable), Tensor(None, (ROWS, WIDTH), BF16)
    with engine.autocast(BF16):
        result = nn.matmul(engine, nn.matmul(engine, x, shadow), shadow)
    del result
    return memory_of(real)[1], planned(engine)[1]


def test_autocast_casts_a_trainable_weight_once_and_a_frozen_one_each_time() -> None:
    once, each_time = casts_of_a_weight_used_twice(True), casts_of_a_weight_used_twice(False)
    assert each_time[0] - once[0] == each_time[1] - once[1] == 2 * WIDTH * WIDTH
