"""The tiles of the kernels: a few for every shape, which fit the card, and one that is chosen for a bucket of rows."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_cases import DTYPES, INTERPRETED, Case, assert_accurate, cases

from squareq_fx.kernels import dispatch, reference, tiles
from squareq_fx.kernels.tiles import CHOSEN, FusedTile, MatmulTile, Tail, candidates, key, row_bucket, tile_for

CARDS = {"H200": (132, 227), "H200 under another Triton": (132, 227), "A100": (108, 163), "RTX 4090": (128, 99)}
"""Multiprocessors, and KiB of shared memory that a program may have; the first one has the kernel for Hopper."""
CARD = torch.device("cuda", 0)
TYPES = {"int8_linear": FusedTile, "int8_matmul": MatmulTile}
each_kernel = pytest.mark.parametrize("kernel", TYPES)
sizes = st.one_of(st.integers(1, 300), st.integers(1, 20000))


@pytest.fixture(params=CARDS)
def card(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[int, int]]:
    """A card that need not be there."""
    processors, kib = CARDS[request.param]
    properties = SimpleNamespace(multi_processor_count=processors, shared_memory_per_block_optin=kib * 1024)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(tiles, "CHOSEN", {})
    monkeypatch.setattr(tiles, "_has_hopper_kernel", lambda device: request.param == "H200")
    for cached in (tiles._guess, tiles._shared_memory):
        cached.cache_clear()
    yield processors, kib
    for cached in (tiles._guess, tiles._shared_memory):
        cached.cache_clear()


@given(st.integers(0, 1 << 24), st.integers(0, 1 << 24))
def test_buckets_of_rows_are_monotone_and_close(a: int, b: int) -> None:
    small, large = sorted((a, b))
    assert row_bucket(small) <= row_bucket(large)
    for rows in (a, b):
        bucket = row_bucket(rows)
        assert rows <= bucket == row_bucket(bucket)
        assert bucket == (8 if rows <= 8 else 16) if rows <= 16 else 8 * (bucket - rows) < rows


def test_the_rows_of_models_are_their_own_buckets() -> None:
    assert [row_bucket(rows) for rows in (1, 8, 9, 16, 17, 32, 77, 154, 2048, 4096, 4608, 8192, 16384)] == [
        8, 8, 16, 16, 18, 32, 80, 160, 2048, 4096, 4608, 8192, 16384,
    ]  # fmt: skip


@given(rows=st.integers(0, 40), width=sizes, depth=sizes, dtype=st.sampled_from(DTYPES))
def test_few_rows_are_vectors_while_that_is_faster(rows: int, width: int, depth: int, dtype: torch.dtype) -> None:
    takes = tiles.gemv_takes(rows, width, depth, dtype)
    assert not takes or rows <= tiles.GEMV_MAX_ROWS <= dispatch.FUSED_MAX_ROWS[dtype]
    assert not takes or tiles.gemv_takes(
        rows, max(1, width - 1), max(1, depth - 1), dtype
    )  # a larger one does not bring it back
    assert not takes or rows == 0 or tiles.gemv_takes(rows - 1, width, depth, dtype) or rows == 1
    assert tiles.gemv_takes(2, width, depth, torch.float32) and not tiles.gemv_takes(2, 1280, 1280, torch.bfloat16)
    assert tiles.gemv_takes(1, 3072, 3072, torch.bfloat16) and not tiles.gemv_takes(1, 6144, 3072, torch.bfloat16)


@each_kernel
@given(rows=sizes, width=sizes, depth=sizes, dtype=st.sampled_from(DTYPES))
def test_every_shape_has_a_few_tiles_that_fit(
    card: tuple[int, int], kernel: str, rows: int, width: int, depth: int, dtype: torch.dtype
) -> None:
    found = candidates(kernel, rows, width, depth, dtype, CARD)
    assert 1 <= len(found) == len(set(found)) <= 12
    compiled = {tile if isinstance(tile, FusedTile) else tile[:7] for tile in found}  # the order of tiles costs no compilation
    assert len(compiled) <= 10
    assert all(isinstance(tile, TYPES[kernel]) for tile in found)
    for tile in found:
        assert tile.m >= 8 and min(tile.n, tile.k) >= 16 and all(side & (side - 1) == 0 for side in tile[:3])
        assert tile.m <= 2 * max(16, rows), "most of the tile would be empty"
        wide = dtype.itemsize if kernel == "int8_linear" else 1
        depth = tile.step if isinstance(tile, FusedTile) else tile.k
        assert tile.stages * depth * (tile.m * wide + tile.n) <= card[1] * 1024
        if kernel == "int8_linear":
            assert isinstance(tile, FusedTile) and tile.m * tile.n <= 8192
            assert tile.warps <= 4, "on eight warps, with wgmma, an H200 computed wrong sums"
            assert tile.pieces == 1 or (tile.split == 1 and tile.warps == tile.pieces), "a piece has a warp of its own"


@each_kernel
@given(rows=sizes, width=sizes, depth=sizes, dtype=st.sampled_from(DTYPES))
def test_a_launch_takes_the_measured_tile_or_a_candidate(
    card: tuple[int, int], kernel: str, rows: int, width: int, depth: int, dtype: torch.dtype
) -> None:
    guess = tile_for(kernel, rows, width, depth, dtype, CARD)
    assert guess in candidates(kernel, row_bucket(rows), width, depth, dtype, CARD)
    assert tile_for(kernel, row_bucket(rows), width, depth, dtype, CARD) == guess
    measured = guess._replace(warps=8)
    tiles.CHOSEN[key(kernel, rows, width, depth, dtype)] = measured
    try:
        assert tile_for(kernel, rows, width, depth, dtype, CARD) == measured
        assert tile_for(kernel, row_bucket(rows), width, depth, dtype, CARD) == measured
        assert tile_for(kernel, 2 * row_bucket(rows), width, depth, dtype, CARD) != measured
        assert tile_for(kernel, rows, width + 1, depth, dtype, CARD) != measured
    finally:
        tiles.CHOSEN.clear()


@pytest.mark.parametrize(
    ("rows", "width", "depth", "tail"),
    [
        (4608, 3072, 3072, Tail.ROWS),  # 72 tiles are left over
        (512, 3072, 3072, Tail.ROWS),  # 96 are all there are
        (16384, 3072, 3072, Tail.WHOLE),  # 168, whose halves would need two turns
        (8192, 640, 640, Tail.WHOLE),
        (4608, 3072, 15360, Tail.DEPTH),
    ],
)
@pytest.mark.parametrize("card", ["H200 under another Triton"], indirect=True)
def test_the_last_tiles_are_cut_where_that_is_faster(
    card: tuple[int, int], rows: int, width: int, depth: int, tail: Tail
) -> None:
    tile = tile_for("int8_matmul", rows, width, depth, torch.bfloat16, CARD)
    assert isinstance(tile, MatmulTile) and tile[:3] == (128, 128, 128) and tile.tail == tail


@pytest.mark.parametrize(
    ("rows", "width", "depth", "tile"),
    [
        (4608, 3072, 3072, (256, True, Tail.ROWS)),  # 36 tiles are left over
        (4608, 3072, 15360, (256, True, Tail.ROWS)),
        (16384, 3072, 3072, (256, True, Tail.WHOLE)),  # 84, whose halves would need two turns
        (8192, 5120, 640, (256, True, Tail.WHOLE)),
        (8192, 640, 2560, (128, True, Tail.ROWS)),  # 2.5 turns of 128 rows, where 256 take 1.5
        (2048, 1280, 1280, (128, True, Tail.ROWS)),  # 1.5, where 256 take 1 and leave 52 multiprocessors idle
        (1024, 1280, 1280, (128, False, Tail.WHOLE)),  # 80 do not fill the card
        (768, 12288, 3072, (128, False, Tail.ROWS)),  # was not measured
    ],
)
@pytest.mark.parametrize("card", ["H200"], indirect=True)
def test_many_rows_have_the_tiles_of_hopper_that_were_fastest_there(
    card: tuple[int, int], rows: int, width: int, depth: int, tile: tuple[int, bool, Tail]
) -> None:
    found = tile_for("int8_matmul", rows, width, depth, torch.bfloat16, CARD)
    assert isinstance(found, MatmulTile) and (found.m, found.fetching, found.tail) == tile


@pytest.mark.parametrize(
    ("rows", "width", "depth", "tile"),
    [
        (2, 1280, 1280, (8, 16, 128, 4, 4, 1, 4)),
        (8, 6144, 3072, (8, 16, 128, 4, 4, 1, 4)),
        (8, 9216, 3072, (8, 16, 128, 4, 3, 1, 4)),  # 576 programs: with the longer pipeline three fit a multiprocessor
        (1, 18432, 3072, (8, 32, 128, 2, 5, 1, 1)),
        (1, 3072, 12288, (8, 32, 128, 2, 4, 8, 1)),
        (8, 3072, 256, (8, 32, 128, 2, 5, 1, 1)),  # less than a step for the warps to share
        (16, 3072, 3072, (16, 32, 128, 2, 4, 4, 1)),
    ],
)
@pytest.mark.parametrize("card", ["H200"], indirect=True)
def test_few_rows_have_the_tile_that_was_fastest_on_hopper(
    card: tuple[int, int], rows: int, width: int, depth: int, tile: tuple[int, ...]
) -> None:
    assert tile_for("int8_linear", rows, width, depth, torch.bfloat16, CARD) == FusedTile(*tile)


@pytest.mark.parametrize(
    ("rows", "width", "depth", "sides"),
    [
        (8, 12288, 3072, (16, 32, 256)),
        (64, 3072, 3072, (16, 32, 256)),
        (154, 1280, 2048, (16, 32, 256)),
        (154, 2560, 2048, (32, 64, 256)),  # 800 of those would be many waves of small tiles
        (256, 3072, 3072, (32, 64, 256)),
        (512, 640, 640, (32, 64, 256)),
        (1, 18432, 3072, (16, 64, 256)),  # of 32 rows, half would be empty
    ],
)
@pytest.mark.parametrize("card", ["H200"], indirect=True)
def test_small_products_have_the_tile_that_was_fastest_on_hopper(
    card: tuple[int, int], rows: int, width: int, depth: int, sides: tuple[int, ...]
) -> None:
    tile = tile_for("int8_matmul", rows, width, depth, torch.bfloat16, CARD)
    assert isinstance(tile, MatmulTile) and tile[:3] == sides and tile.programs == 0


@pytest.mark.parametrize(
    ("triton", "major", "there"),
    [
        *(("3.6.0", 9, True), ("3.9.1", 9, True), ("3.5.1", 9, False), ("3.10.0", 9, False)),
        *(("3.6.0", 8, False), ("3.6.0", 10, False)),
    ],
)
def test_the_kernel_for_hopper_is_for_hopper_and_tritons_it_was_tried_with(
    monkeypatch: pytest.MonkeyPatch, triton: str, major: int, there: bool
) -> None:
    monkeypatch.setattr(tiles, "version", lambda name: triton)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (major, 0))
    has = tiles._has_hopper_kernel.__wrapped__
    assert has(CARD) == there and not has(torch.device("cpu"))


@pytest.mark.parametrize(("rows", "group"), ((16384, 2), (12288, -6), (4608, -6), (20, -6)))
@pytest.mark.parametrize("card", ["H200"], indirect=True)
def test_many_rows_are_taken_in_bands_of_rows(card: tuple[int, int], rows: int, group: int) -> None:
    tile = tile_for("int8_matmul", rows, 3072, 3072, torch.bfloat16, CARD)
    assert isinstance(tile, MatmulTile) and tile.group == group


def test_other_kernels_have_no_tiles() -> None:
    from squareq_fx.kernels.trial import trial

    assert candidates("quantize_rows", 10, 20, 30, torch.float32, CARD) == ()
    with pytest.raises(ValueError, match="'quantize_rows' has no tiles to choose from; int8_linear and int8_matmul have"):
        trial("quantize_rows", 10, 20, 30, torch.float32, torch.device("cpu"))


if INTERPRETED:

    @each_kernel
    @pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
    def test_a_trial_runs_a_kernel_on_one_shape_with_any_tile(kernel: str, dtype: torch.dtype) -> None:
        from squareq_fx.kernels.trial import trial

        run = trial(kernel, 3, 40, 70, dtype, torch.device("cpu"))
        tile = FusedTile(16, 16, 32, 4, 1, 2) if kernel == "int8_linear" else MatmulTile(16, 16, 32, 4, 1, 1, Tail.DEPTH)
        y = run(tile)
        assert y.shape == (8, 40) and y.dtype == dtype and run.is_right(y)
        for wrong in (torch.zeros_like(y), y.roll(1, 0), torch.where(torch.arange(40) < 8, y.roll(1, 1), y), y * float("nan")):
            assert not run.is_right(wrong)
        if kernel == "int8_matmul":
            assert torch.equal(y, run(tile._replace(k=64, programs=0)))

    def test_a_chosen_split_is_as_exact_as_none() -> None:
        from squareq_fx.kernels.int8_linear import int8_linear

        for dtype in DTYPES:
            inputs = Case((20,), 300, 40, dtype, zero_points=True).build("cpu")
            for split in (1, 2, 3, 5, 99):
                tile = FusedTile(16, 32, 64, 4, 1, split)
                assert_accurate(int8_linear(*inputs, tile), inputs)

    @given(case=cases(largest=33), tile=st.sampled_from([(16, 16, 32, 2), (16, 32, 16, 4), (32, 16, 16, 8)]))
    def test_warps_that_share_a_tile_s_depth_are_as_exact(case: Case, tile: tuple[int, int, int, int]) -> None:
        from squareq_fx.kernels.int8_linear import int8_linear

        *sides, pieces = tile
        inputs = case.build("cpu")
        assert_accurate(int8_linear(*inputs, FusedTile(*sides, 4, 1, 1, pieces)), inputs)


@pytest.mark.gpu
def test_the_kernels_take_what_was_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    from squareq_fx.kernels import int8_linear, int8_matmul

    x, *layer, bias = Case((40,), 256, 96, torch.bfloat16).build("cuda")
    shape = (40, 96, 256, torch.bfloat16)
    for kernel, module in (("int8_linear", int8_linear), ("int8_matmul", int8_matmul)):
        for tile in candidates(kernel, *shape, x.device):
            monkeypatch.setitem(CHOSEN, key(kernel, *shape), tile)
            seen: list[object] = []
            monkeypatch.setattr(module, "tile_for", lambda *a, seen=seen: (seen.append(tile_for(*a)), seen[-1])[1])
            compute = "w8a16" if kernel == "int8_linear" else "w8a8"
            dispatch.int8_linear(x, *layer, bias, compute)
            assert seen == [tile]


@pytest.mark.gpu
def test_a_new_number_of_rows_compiles_nothing() -> None:
    from squareq_fx.kernels import int8_linear, int8_linear_few, int8_matmul, quantize_rows

    kernels = [int8_linear._int8_linear, int8_linear_few._int8_linear_few]
    kernels += [int8_matmul._int8_matmul, quantize_rows._quantize_rows]
    if tiles._has_hopper_kernel(torch.device("cuda", torch.cuda.current_device())):
        from squareq_fx.kernels import int8_matmul_hopper

        kernels.append(int8_matmul_hopper._int8_matmul)
    x, *layer, bias = Case((64,), 256, 96, torch.bfloat16).build("cuda")

    def run(rows: int) -> None:
        dispatch.int8_linear(x[:rows], *layer, bias)
        dispatch.int8_linear(x[:rows], *layer, bias, "w8a8")

    def known() -> int:
        return sum(len(cache[0]) for kernel in kernels for cache in kernel.device_caches.values())

    tile = int8_linear.tile_for("int8_linear", 64, 96, 256, torch.bfloat16, x.device)
    for rows in (3, 12, 33, 64):
        run(rows)
    found = candidates("int8_matmul", 512, 96, 256, torch.bfloat16, x.device)
    large = [t for t in found if isinstance(t, MatmulTile) and t.fetching]
    arguments = dispatch.quantize_rows(x.repeat(10, 1))

    def run_large() -> None:
        for rows in (257, 300, 511, 640):
            for large_tile in large:
                int8_matmul.int8_matmul(*(part[:rows] for part in arguments), *layer, bias, torch.bfloat16, tile=large_tile)

    run_large()
    before = known()
    run_large()
    for rows in (*range(3, 17), *range(49, 65)):
        if int8_linear.tile_for("int8_linear", rows, 96, 256, torch.bfloat16, x.device) == tile or rows <= 16:
            run(rows)
    assert known() == before


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_tile_is_accurate_and_repeatable_at_a_model_s_size(dtype: torch.dtype) -> None:
    """A race in a pipelined tile shows only on a card, at sizes that fill it, as bits that change between runs."""
    from squareq_fx.kernels.int8_linear import int8_linear

    generator = torch.Generator("cuda").manual_seed(0)
    x = torch.randn(512, 3072, device="cuda", generator=generator).to(dtype)
    q, scale, zero = reference.quantize_weight(torch.randn(3072, 3072, device="cuda", generator=generator) / 55)
    exact = x.double() @ reference.dequantize(q, scale, zero, 3072).double().t()
    torchs = torch.nn.functional.linear(x, reference.dequantize(q, scale, zero, 3072, dtype))
    allowed = 2 * (torchs.double() - exact).norm() / exact.norm() + 1e-6
    for rows in (8, 16, 32, 64, 128):
        for tile in candidates("int8_linear", rows, 3072, 3072, dtype, x.device):
            for few in (rows, 512):  # the few rows the tile is for, which may be split, and many
                assert isinstance(tile, FusedTile)
                runs = [int8_linear(x[:few], q, scale, zero, None, tile) for _ in range(5)]
                assert all(torch.equal(runs[0], run) for run in runs[1:]), f"tile {tile}"
                assert (runs[0].double() - exact[:few]).norm() / exact[:few].norm() <= allowed, f"tile {tile}"
