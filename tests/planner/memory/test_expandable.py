"""The compiled replay with expandable segments against the allocator in Python, on random streams:
small and large requests, with and without a cap, the cache emptied between."""

from __future__ import annotations

from array import array

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.memory import expandable
from planner.memory.expandable import expandable_replay, expandable_replay_in_python
from planner.memory.pools import RELEASE, RESET, Part
from planner.memory.program import run
from planner.memory.requirement import reserve
from planner.models.registry import load_model
from planner.spec import RunSpec

MIB = 1 << 20
SIZES = st.one_of(
    st.sampled_from([0, 512, 64 << 10, MIB, MIB + 512, 5 * MIB, 10 * MIB, 21 * MIB, 64 * MIB]),
    st.integers(1, 30 * MIB // 512).map(lambda blocks: blocks * 512),
)


@st.composite
def _parts(draw: st.DrawFn) -> list[Part]:
    parts = []
    base = 0
    for flags in (RELEASE, RELEASE, RESET, 0):
        sizes = draw(st.lists(SIZES, min_size=1, max_size=40))
        events: list[int] = []
        live: list[int] = []
        for index in range(len(sizes)):
            events.append(index)
            live.append(index)
            for _ in range(draw(st.integers(0, 2))):
                if live:
                    events.append(~live.pop(draw(st.integers(0, len(live) - 1))))
        parts.append(Part(array("q", events), array("q", sizes), base, flags))
        base += len(sizes)
    return parts


@settings(max_examples=300, deadline=None)
@given(_parts(), st.integers(0, 120))
def test_compiled_and_python_say_the_same(parts: list[Part], percent: int) -> None:
    if expandable._expandable is None:
        pytest.skip("not compiled here")
    compiled, plain = expandable_replay(parts), expandable_replay_in_python(parts)
    free = plain(-1)
    assert compiled(-1) == free
    cap = free.peak_allocated + (free.peak_reserved - free.peak_allocated) * percent // 100
    expected = plain(cap)
    found = compiled(cap)
    assert found.ok == expected.ok
    if found.ok:
        assert found == expected


@pytest.mark.parametrize("fields", [{}, {"gradient_checkpointing": True, "micro_batch_size": 2}])
def test_a_run_needs_the_same_without_the_compiled_module(
    fields: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    if expandable._expandable is None:
        pytest.skip("not compiled here")
    spec = RunSpec.model_validate({"model": "Qwen/Qwen2.5-0.5B", **fields})
    program = run(spec, load_model(spec.model))
    compiled = reserve(program, 32 * MIB, True)
    monkeypatch.setattr(expandable, "_expandable", None)
    assert reserve(program, 32 * MIB, True) == compiled
