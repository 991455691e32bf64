"""Optimizers of other packages against those packages' own code: states, and what a step holds.

The figures were measured by tests/planner/memory/packages.py on the meta device, where no package
is needed again; Triton and compiled kernels do not run there, so of three only the states are.
"""

from __future__ import annotations

import json
from math import prod
from pathlib import Path

import pytest

from planner.dtypes import BF16, F32, DType
from planner.errors import InputError, UnsupportedError
from planner.estimate import estimate
from planner.memory.ops import Engine
from planner.memory.optimizer import Optimizer
from planner.memory.optimizers import REFUSED, find_optimizer
from planner.memory.program import run
from planner.memory.states import _state_sizes
from planner.memory.storage import Recorder
from planner.memory.tensor import Tensor
from planner.models.registry import load_model
from planner.spec import Optimizer as Names
from planner.spec import RunSpec
from tests.planner.tiny import tiny_spec

MEASURED = json.loads(
    (Path(__file__).parents[1] / "data" / "optimizers.json").read_text(encoding="utf-8")
)["measured"]
# As tests/planner/memory/packages.py has them (that module needs torch).
MODULES = {"down": (512, 1024), "up": (1536, 512), "small": (300, 64), "narrow": (2048, 16),
           "flat": (16, 2048), "norm": (512,)}  # fmt: skip
STATES_ONLY = ("adamw_torch_4bit", "adamw_torch_8bit", "stable_adamw")
TOLERANCE = 16 * 512  # scalars and small vectors, a block of 512 bytes each
DTYPES = {"float32": F32, "bfloat16": BF16}


class _Meta(Engine):
    """LAPACK's working copy is inside the kernel, where the meta device has nothing."""

    def new(self, shape, dtype, op, category="temporaries"):  # type: ignore[no-untyped-def]
        if op == "clone (svd)":
            return Tensor(None, shape, dtype)
        return super().new(shape, dtype, op, category)


def _leaves(t: Engine, dtype: DType) -> list[Tensor]:
    leaves = [Tensor(None, shape, dtype, True, name=f"{name}.weight")
              for name, shape in MODULES.items()]  # fmt: skip
    for leaf in leaves:
        leaf.grad = t.new(leaf.shape, dtype, "gradient")
    return leaves


def _step(optimizer: Optimizer, t: Engine, leaves: list[Tensor]) -> None:
    if optimizer.in_backward:
        for leaf in leaves:
            optimizer.leaf_step(t, leaf)
    else:
        optimizer.step(t, leaves)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", MEASURED)
def test_states_are_those_of_the_package(name: str, dtype: str) -> None:
    optimizer = find_optimizer(name)
    states = [s for leaf in _leaves(Engine(), DTYPES[dtype]) for s in optimizer.states(leaf)]
    device, paged, _ = _state_sizes(states)
    assert paged == 0
    assert sum(device) == pytest.approx(MEASURED[name][dtype]["states_bytes"], abs=TOLERANCE)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", [name for name in MEASURED if name not in STATES_ONLY])
def test_a_step_holds_what_the_package_holds(name: str, dtype: str) -> None:
    recorder = Recorder()
    t = _Meta(recorder)
    leaves = _leaves(t, DTYPES[dtype])
    before = recorder.live_bytes
    recorder.enter("optimizer step")
    _step(find_optimizer(name), t, leaves)
    recorder.enter("end")
    found = recorder.instants[-1].peak_bytes - before
    assert found == pytest.approx(MEASURED[name][dtype]["step_bytes"], abs=TOLERANCE)


@pytest.mark.parametrize("name", Names.__args__)  # type: ignore[attr-defined]
def test_every_name_of_transformers_is_answered_or_refused_with_a_reason(
    name: str, tiny: str
) -> None:
    spec = tiny_spec(tiny, optimizer=name, method="full", quantization="none")
    if name in REFUSED:
        with pytest.raises(UnsupportedError, match=name) as caught:
            estimate(spec)
        assert REFUSED[name] in str(caught.value)
        return
    answer = estimate(spec)
    assert answer.peak_allocated_bytes > answer.resident_bytes


def test_names_are_those_of_transformers() -> None:
    training_args = pytest.importorskip("transformers.training_args")
    assert set(Names.__args__) == {n.value for n in training_args.OptimizerNames}  # type: ignore[attr-defined]


IN_BACKWARD = ("lomo", "adalomo", "galore_adamw_layerwise", "apollo_adamw_layerwise")


@pytest.mark.parametrize("name", IN_BACKWARD)
def test_gradients_that_are_used_at_once_do_not_pile_up(name: str) -> None:
    fields = {"model": "Qwen/Qwen2.5-0.5B", "method": "full", "quantization": "none"}
    spec = RunSpec.model_validate({**fields, "optimizer": name})
    model = load_model(spec.model)
    largest = max(prod(module.weight_shape) for module in model.tree.modules) * 2
    stretched, whole = run(spec, model), run(spec, model, Recorder())
    assert list(stretched.recorder.events) == list(whole.recorder.events)
    assert stretched.states == whole.states
    after = next(i for i in whole.recorder.instants if i.name == "clipping")
    assert after.peak_bytes < largest


def test_adalomo_keeps_states_of_frozen_weights_too() -> None:
    fields = {"model": "facebook/chameleon-7b", "optimizer": "adalomo"}
    spec = RunSpec.model_validate(fields)
    model = load_model(spec.model)
    linears = [m for m in model.tree.modules if m.kind == "linear" and m.component != "lm_head"]
    rows = sum(prod(module.weight_shape) // 2 for module in linears)  # 4 bits, packed (n, 1)
    assert run(spec, model).states.device_bytes > 4 * rows


def test_layerwise_refuses_accumulation_as_trainer_does(tiny: str) -> None:
    spec = tiny_spec(tiny, optimizer="galore_adamw_layerwise", gradient_accumulation_steps=2)
    with pytest.raises(InputError, match="gradient_accumulation_steps"):
        estimate(spec)
