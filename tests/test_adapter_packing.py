"""Masters to the graph's matrices and back, for any shapes, ranks, factors and dtypes."""

from __future__ import annotations

import itertools

import torch
from hypothesis import given
from hypothesis import strategies as st

from squareq_fx.adapters.packing import Branch, Part, Slot, pack, unpack_gradients

CPU = torch.device("cpu")
SIZES = st.integers(1, 9)


@st.composite
def branches(draw: st.DrawFn) -> list[Branch]:
    """Layers of a few sizes, each with up to three adapters; masters may be parameters."""
    found = []
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    for i in range(draw(st.integers(0, 7))):
        dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
        slot = Slot(f"layer{i}", draw(SIZES), draw(SIZES), draw(st.sampled_from("rs")), dtype)
        parts = []
        for _ in range(draw(st.integers(0, 3))):
            rank, trains = draw(st.integers(1, 5)), draw(st.booleans())
            down = torch.randn(rank, slot.in_features, generator=generator).requires_grad_(trains)
            up = torch.randn(slot.out_features, rank, generator=generator).requires_grad_(trains)
            parts.append(Part(down, up, draw(st.sampled_from([1.0, 0.5, -3.0, 0.0]))))
        found.append(Branch(slot, tuple(parts)))
    return found


def widest(given: list[Branch], branch: Branch) -> int:
    return max(b.rank for b in given if b.slot.rank_size == branch.slot.rank_size)


@given(branches())
def test_the_parts_lie_side_by_side_with_their_factors_in_b(given: list[Branch]) -> None:
    packed = pack(given, CPU)
    assert len(packed) == 2 * len(given)
    for branch, down, up in zip(given, packed[0::2], packed[1::2]):
        slot, rank = branch.slot, widest(given, branch)
        rest = rank - branch.rank
        rows = [p.down.detach() for p in branch.parts] + [torch.zeros(rest, slot.in_features)]
        columns = [p.up.detach() * p.scaling for p in branch.parts] + [torch.zeros(slot.out_features, rest)]
        assert torch.equal(down, torch.cat(rows).to(slot.dtype)) and down.is_contiguous()
        assert torch.equal(up, torch.cat(columns, dim=1).to(slot.dtype)) and up.is_contiguous()
        assert not down.requires_grad and not up.requires_grad


@given(branches())
def test_no_two_share_bytes_and_each_begins_where_matrix_products_want_it(given: list[Branch]) -> None:
    ranges = sorted((t.data_ptr(), t.data_ptr() + t.nbytes) for t in pack(given, CPU) if t.numel())
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(ranges))
    for tensor in pack(given, CPU):
        assert tensor.storage_offset() % 16 == 0


@given(branches(), st.sets(st.integers(0, 13)))
def test_gradients_go_back_to_the_masters(given: list[Branch], missing: set[int]) -> None:
    gradients = [None if i in missing else torch.randn(t.shape).to(t.dtype) for i, t in enumerate(pack(given, CPU))]
    before = [None if g is None else g.clone() for g in gradients]
    found = iter(unpack_gradients(given, gradients))
    for branch, down, up in zip(given, gradients[0::2], gradients[1::2]):
        start = 0
        for part in branch.parts:
            stop = start + part.down.shape[0]
            first, second = next(found)
            assert (first is None) == (down is None) and (second is None) == (up is None)
            if first is not None and down is not None:
                assert first.dtype == torch.float32 and torch.equal(first, down[start:stop].float())
            if second is not None and up is not None:
                assert second.dtype == torch.float32 and torch.equal(second, up[:, start:stop].float() * part.scaling)
            start = stop
    assert next(found, None) is None
    for gradient, copy in zip(gradients, before):
        assert gradient is None or (copy is not None and torch.equal(gradient, copy))
