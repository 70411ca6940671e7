"""Segments cover every byte exactly once; a store gives exactly those bytes, verified before the first."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from runtime_support import make_store, read

from squareq_fx.errors import RuntimeStateError, SlabError
from squareq_fx.runtime import Piece, Segment, WeightStore

pytestmark = pytest.mark.timeout(60)


@given(st.lists(st.integers(0, 40), max_size=8), st.randoms(use_true_random=False))
def test_pieces_in_any_order_make_the_segment(sizes: list[int], random) -> None:
    data = torch.arange(64, dtype=torch.uint8).repeat(4)
    pieces, expected, end = [], b"", 0
    for size in sizes:
        source = random.randrange(0, 200)
        is_tensor = random.random() < 0.5
        chunk = data[source : source + size]
        pieces.append(Piece(end, size, chunk.clone() if is_tensor else source))
        expected += read(chunk)
        end += size
    random.shuffle(pieces)
    store = WeightStore(data, [Segment("s", end, tuple(pieces))])
    assert read(store.host_view("s")) == expected
    start = random.randrange(0, end + 1)
    length = random.randrange(0, end - start + 1)
    part = torch.full((length,), 0xEE, dtype=torch.uint8)
    store.gather("s", part, start)
    assert read(part) == expected[start : start + length]


@given(st.lists(st.tuples(st.integers(0, 12), st.integers(1, 6)), max_size=5), st.integers(0, 16))
def test_a_segment_with_a_gap_or_an_overlap_is_refused(ranges: list[tuple[int, int]], nbytes: int) -> None:
    covered = [0] * 32
    for start, size in ranges:
        for byte in range(start, start + size):
            covered[byte] += 1
    pieces = tuple(Piece(start, size, 0) for start, size in ranges)
    if covered == [1] * nbytes + [0] * (32 - nbytes):
        Segment("s", nbytes, pieces)
    else:
        with pytest.raises(RuntimeStateError, match=r"segment 's'.*exactly one piece"):
            Segment("s", nbytes, pieces)


def test_neighbours_in_the_slab_become_one_zero_copy_range() -> None:
    segment = Segment("s", 30, (Piece(10, 20, 110), Piece(0, 10, 100)))
    assert segment.data_offset == 100 and len(segment.pieces) == 1
    data = torch.zeros(200, dtype=torch.uint8)
    assert WeightStore(data, [segment]).host_view("s").data_ptr() == data.data_ptr() + 100
    assert Segment("s", 30, (Piece(10, 20, 111), Piece(0, 10, 100))).data_offset is None


@pytest.mark.parametrize(
    "dtype", [torch.int8, torch.bfloat16, torch.float32, torch.bool, torch.float8_e4m3fn]
)
def test_a_piece_takes_a_tensor_of_any_dtype_and_layout(dtype: torch.dtype) -> None:
    tensor = torch.arange(12).reshape(3, 4).to(dtype).t()
    nbytes = tensor.numel() * tensor.element_size()
    store = WeightStore(
        torch.zeros(0, dtype=torch.uint8), [Segment("s", nbytes, (Piece(0, nbytes, tensor),))]
    )
    assert store.host_view("s").view(dtype).reshape(4, 3).equal(tensor)
    trained = torch.nn.Parameter(torch.ones(2))
    assert not getattr(Piece(0, 8, trained).source, "requires_grad", True)


def test_wrong_pieces_and_stores_are_refused() -> None:
    data = torch.zeros(8, dtype=torch.uint8)
    whole = Segment("s", 8, (Piece(0, 8, 0),))
    with pytest.raises(RuntimeStateError, match="given a tensor of 12 bytes"):
        Piece(0, 8, torch.zeros(3))
    with pytest.raises(RuntimeStateError, match="the store keeps bytes on the CPU"):
        Piece(0, 8, torch.zeros(2, device="meta"))
    with pytest.raises(RuntimeStateError, match="negative"):
        Piece(-1, 8, 0)
    with pytest.raises(RuntimeStateError, match="start at 0"):
        Piece(0, 8, -1)
    with pytest.raises(RuntimeStateError, match="reads 8 bytes from 1 on"):
        WeightStore(data, [Segment("s", 8, (Piece(0, 8, 1),))])
    with pytest.raises(RuntimeStateError, match="two segments"):
        WeightStore(data, [whole, whole])
    with pytest.raises(RuntimeStateError, match="contiguous uint8"):
        WeightStore(data.view(torch.int8), [whole])
    with pytest.raises(RuntimeStateError, match="contiguous uint8"):
        WeightStore(torch.zeros(16, dtype=torch.uint8)[::2], [whole])
    with pytest.raises(RuntimeStateError, match="none of resident, host, disk"):
        WeightStore(data, [whole], backing="tape")  # type: ignore[arg-type]
    with pytest.raises(RuntimeStateError, match=r"no segment is called 't'.*s"):
        WeightStore(data, [whole], keep_resident=["t"])


def test_each_segment_is_verified_once_before_its_first_use() -> None:
    calls: list[str] = []
    store, truth = make_store([20, 30, 40], verify=calls.append)
    assert calls == []
    for _ in range(3):
        assert read(store.host_view("b1")) == truth["b1"]
    assert read(store.host_view("b0")) == truth["b0"]
    assert calls == ["b1", "b0"]


def test_a_failed_verification_is_asked_again() -> None:
    faults = [SlabError("b0 is damaged"), None]

    def verify(name: str) -> None:
        fault = faults.pop(0)
        if fault is not None:
            raise fault

    store, truth = make_store([20], verify=verify)
    with pytest.raises(SlabError, match="b0 is damaged"):
        store.host_view("b0")
    assert read(store.host_view("b0")) == truth["b0"]
    assert faults == []


def test_assembled_segments_share_one_packed_buffer() -> None:
    store, _ = make_store([100, 300, 500, 100, 300])
    views = [store.host_view(name) for name in ("b1", "b2", "b4")]
    assert len({view.untyped_storage().data_ptr() for view in views}) == 1
    assert store.host_bytes() == 512 + 512 + 512
    assert store.host_view("b0").untyped_storage().data_ptr() == store.data.untyped_storage().data_ptr()
