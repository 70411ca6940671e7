"""The arena's bookkeeping against a byte-by-byte model."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from squareq_fx.errors import RuntimeStateError
from squareq_fx.runtime.arena import ArenaMap

pytestmark = pytest.mark.timeout(60)

SLOTS = 8

acts = st.lists(
    st.tuples(st.integers(0, 5), st.integers(0, SLOTS), st.integers(0, 4), st.booleans()), max_size=40
)


@given(acts)
def test_occupants_and_marks_agree_with_bytes(acts: list[tuple[int, int, int, bool]]) -> None:
    arena: ArenaMap[int, int] = ArenaMap(SLOTS * 256)
    owner: list[int | None] = [None] * SLOTS
    last_freed: list[int | None] = [
        None
    ] * SLOTS  # the mark of the last reader of each slot, not yet waited for
    held: dict[int, tuple[int, int]] = {}
    for moment, (key, slot, slots, with_mark) in enumerate(acts):
        if key in held:
            first, last = held.pop(key)
            arena.free(key, moment if with_mark else None)
            for byte in range(first, last):
                owner[byte] = None
                last_freed[byte] = moment if with_mark else last_freed[byte]
            continue
        if slot + slots > SLOTS:
            with pytest.raises(RuntimeStateError, match="do not fit into an arena"):
                arena.occupants(slot * 256, slots * 256)
            continue
        inside = range(slot, slot + slots)
        found = arena.occupants(slot * 256, slots * 256)
        assert set(found) == {owner[byte] for byte in inside} - {None}
        if not found:
            marks = arena.occupy(key, slot * 256, slots * 256)
            needed = {last_freed[byte] for byte in inside} - {None}
            assert needed <= set(marks)
            for byte, mark in enumerate(last_freed):
                last_freed[byte] = None if mark in marks else mark
            for byte in inside:
                owner[byte] = key
            held[key] = (slot, slot + slots)


def test_unaligned_and_negative_offsets_are_refused() -> None:
    arena: ArenaMap[int, int] = ArenaMap(1024)
    for offset in (-256, 1, 128):
        with pytest.raises(RuntimeStateError, match="multiple of 256"):
            arena.occupants(offset, 8)


def test_an_empty_range_is_nobodys() -> None:
    arena: ArenaMap[int, int] = ArenaMap(1024)
    arena.occupy(1, 0, 1024)
    assert arena.occupants(256, 0) == []
    assert arena.occupants(1024, 0) == []
