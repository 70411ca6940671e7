"""The fused kernel's tiles: chosen once for a bucket of rows, and all of them compile for Hopper."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_cases import DTYPES, INTERPRETED, Case, assert_accurate

triton = pytest.importorskip("triton")

from squareq_fx.kernels import dequantize_rows, int8_linear, reference  # noqa: E402  (imports triton)

NAMES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@given(st.integers(0, 10**6), st.sampled_from(DTYPES))
def test_every_number_of_rows_has_a_few_tiles(rows: int, dtype: torch.dtype) -> None:
    bucket = int8_linear.row_bucket(rows)
    assert bucket >= min(rows, 512)
    tiles = int8_linear.tiles_for(bucket, dtype)
    assert 2 <= len(tiles) == len(set(tiles)) <= 6
    assert all(min(rows, 16) <= block_m <= bucket for block_m, *_ in tiles)


if INTERPRETED:

    def test_tuning_happens_once_for_a_bucket(monkeypatch: pytest.MonkeyPatch) -> None:
        benched: list[int] = []

        def bench(launch: Callable[[], None], quantiles: object) -> list[float]:
            launch()
            benched.append(1)
            return [10.0 - len(benched) % 3] * 3

        monkeypatch.setattr(int8_linear, "_INTERPRETER_TILE", None)
        monkeypatch.setattr(int8_linear._tuned, "do_bench", bench)
        x, *layer = Case((40,), 70, 33, torch.float16, zero_points=True).build("cpu")
        for rows, tuned in ((3, 16), (1, None), (16, None), (17, 32), (32, None), (40, 64), (2, None)):
            benched.clear()
            inputs = (x[:rows], *layer)
            assert_accurate(int8_linear.int8_linear(*inputs), inputs)
            assert len(benched) == (len(int8_linear.tiles_for(tuned, x.dtype)) if tuned else 0), rows
        benched.clear()
        int8_linear.int8_linear(x.float(), *layer)
        assert len(benched) == len(int8_linear.tiles_for(64, torch.float32))


@pytest.mark.gpu
def test_a_new_number_of_rows_compiles_and_tunes_nothing() -> None:
    x, *layer = Case((64,), 256, 96, torch.bfloat16).build("cuda")
    inputs = (x, *layer)
    assert_accurate(int8_linear.int8_linear(*inputs), inputs)
    int8_linear.int8_linear(x[:7], *layer)

    def known() -> tuple[int, int]:
        caches = int8_linear._int8_linear.fn.device_caches
        return sum(len(cache[0]) for cache in caches.values()), len(int8_linear._tuned.cache)

    before = known()
    for rows in (*range(1, 17), *range(33, 65)):
        int8_linear.int8_linear(x[:rows], *layer)
    assert known() == before


@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize("dtype", ("bf16", "fp16", "fp32"))
def test_the_kernels_compile_for_hopper_without_a_gpu(
    dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))

    def ptx(
        kernel: object, types: dict[str, str], constants: dict[str, object], warps: int, stages: int
    ) -> str:
        names = kernel.arg_names
        signature = {name: types.get(name, "constexpr" if name in constants else "i32") for name in names}
        aligned = {
            (i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if signature[name] != "constexpr"
        }
        source = ASTSource(kernel, signature, {(names.index(k),): v for k, v in constants.items()}, aligned)
        options = {"num_warps": warps, "num_stages": stages}
        return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]

    floats = dict.fromkeys(("scale_ptr", "zero_ptr", "bias_ptr"), "*fp32")
    types = {"x_ptr": f"*{dtype}", "y_ptr": f"*{dtype}", "w_ptr": f"*{dtype}", "q_ptr": "*i8", **floats}
    block_m, block_n, block_k, warps, stages = int8_linear.tiles_for(64, NAMES[dtype])[1]
    constants = {"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k, "EVEN_K": True, "WIDEN": False}
    fused = ptx(int8_linear._int8_linear.fn, types, constants, warps, stages)
    assert ("wgmma.mma_async" in fused) == (dtype != "fp32")
    rows, columns, warps = dequantize_rows.TILES[NAMES[dtype]]
    flat = ptx(dequantize_rows._dequantize_rows, types, {"BLOCK_N": rows, "BLOCK_K": columns}, warps, 1)
    assert "st.global.v4" in flat


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
def test_every_tile_is_accurate_and_repeatable_at_a_model_s_size(name: str) -> None:
    """A race in a pipelined tile shows only on a card, at sizes that fill it, as bits that change between runs."""
    dtype = NAMES[name]
    generator = torch.Generator("cuda").manual_seed(0)
    x = torch.randn(512, 3072, device="cuda", generator=generator).to(dtype)
    q, scale, zero = reference.quantize_weight(torch.randn(3072, 3072, device="cuda", generator=generator) / 55)
    exact = x.double() @ reference.dequantize(q, scale, zero, 3072).double().t()
    torchs = torch.nn.functional.linear(x, reference.dequantize(q, scale, zero, 3072, dtype))
    allowed = 2 * (torchs.double() - exact).norm() / exact.norm() + 1e-6
    for bucket in (16, 32, 64, 128, 256, 512):
        for tile in int8_linear.tiles_for(bucket, dtype):
            runs = [int8_linear.int8_linear(x, q, scale, zero, None, tile) for _ in range(5)]
            assert all(torch.equal(runs[0], run) for run in runs[1:]), f"tile {tile}"
            assert (runs[0].double() - exact).norm() / exact.norm() <= allowed, f"tile {tile}"
