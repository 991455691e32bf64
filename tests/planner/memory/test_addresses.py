"""Where segments lie: against an allocator history of an H200 (Qwen2.5-7B, driver 580)."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from planner.memory.addresses import RANGE_BYTES, AddressSpace

MIB = 1 << 20


def test_segments_lie_as_the_driver_put_them() -> None:
    """Sizes in MiB and addresses of a run's first segments, as its history has them."""
    seen = [
        (296, 0x7F3F4C000000), (2, 0x7F3F5E800000), (2, 0x7F3F5EA00000), (296, 0x7F3F38000000),
        (2, 0x7F3F4A800000), (296, 0x7F3F24000000), (2, 0x7F3F36800000), (296, 0x7F3F10000000),
        (2, 0x7F3F22800000), (1188, 0x7F3EC4000000),
    ]  # fmt: skip
    space = AddressSpace()
    space.low = 0x7F3F60000000
    assert [space.take(size * MIB) for size, _ in seen] == [address for _, address in seen]


def test_power_of_two_ranges_are_aligned_and_gaps_are_used_again() -> None:
    space = AddressSpace()
    space.low = 0x7F43A6000000
    assert space.take(512 * MIB) == 0x7F4380000000
    assert space.take(64 * MIB) == 0x7F43A0000000  # in the gap above
    space.give(0x7F4380000000, 512 * MIB)
    assert space.take(160 * MIB) == 0x7F4396000000


@given(st.lists(st.tuples(st.integers(1, 700), st.booleans()), max_size=60))
def test_segments_never_overlap_and_all_can_be_given_back(
    wanted: list[tuple[int, bool]],
) -> None:
    space = AddressSpace()
    held: list[tuple[int, int]] = []
    for size, gives in wanted:
        bytes_ = size * 2 * MIB
        address = space.take(bytes_)
        assert all(address + bytes_ <= a or a + s <= address for a, s in held)
        held.append((address, bytes_))
        if gives:
            space.give(*held.pop(len(held) // 2))
    for segment in held:
        space.give(*segment)
    assert not space.ranges
    assert not space.left
    assert all(size % RANGE_BYTES == 0 for _, size in space.gaps)
