"""int8_gemv, the W8A16 product of one or two rows: on CUDA (marker gpu) and interpreted; it has no way on the CPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_cases import DTYPES, INTERPRETED, Case, assert_accurate, cases

from squareq_fx.kernels import dispatch

DEVICES = ["cpu"] if INTERPRETED else [pytest.param("cuda", marks=pytest.mark.gpu)]
each_device = pytest.mark.parametrize("device", DEVICES)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
ROWS = ((), (1,), (2,), (1, 2), (2, 1), (0,), (1, 0))


@each_device
@given(case=cases(largest=40), rows=st.sampled_from(ROWS))
def test_shapes_dtypes_zero_points_padding_and_strides(device: str, case: Case, rows: tuple[int, ...]) -> None:
    from squareq_fx.kernels.int8_gemv import int8_gemv

    inputs = replace(case, rows=rows).build(device)
    y = int8_gemv(*inputs)
    assert_accurate(y, inputs)
    assert torch.equal(int8_gemv(*inputs), y), "two calls differ"


@each_device
@each_dtype
@pytest.mark.parametrize("rows", (1, 2))
@pytest.mark.parametrize("inner", (150, 512, 1100))
def test_zero_points_that_almost_cancel(device: str, dtype: torch.dtype, rows: int, inner: int) -> None:
    from squareq_fx.kernels.int8_gemv import int8_gemv

    x, qweight, scale, _, bias = Case((rows,), inner, 20, dtype).build(device)
    shifted = (qweight[:, :inner].float() / 2 + 60).round().to(torch.int8)
    inputs = (x + 2, shifted, scale, torch.full_like(scale, 60.0), bias)
    assert_accurate(int8_gemv(*inputs), inputs)


@each_device
@pytest.mark.parametrize("rows", (1, 2))
def test_degenerate_widths(device: str, rows: int) -> None:
    from squareq_fx.kernels.int8_gemv import int8_gemv

    no_inputs = Case((rows,), 0, 6, torch.float32).build(device)
    assert torch.equal(int8_gemv(*no_inputs), no_inputs[4].expand(rows, 6))
    assert int8_gemv(*Case((rows,), 8, 0, torch.float32).build(device)).shape == (rows, 0)
    one = Case((rows,), 1, 1, torch.float32).build(device)
    assert_accurate(int8_gemv(*one), one)


@each_device
def test_nan_stays_in_its_row(device: str) -> None:
    from squareq_fx.kernels.int8_gemv import int8_gemv

    x, *layer = Case((2,), 100, 40, torch.float32).build(device)
    x[1, 50] = float("nan")
    bad = int8_gemv(x, *layer).isnan()
    assert bad[1].all() and not bad[0].any()


@each_device
def test_more_rows_are_refused(device: str) -> None:
    from squareq_fx.kernels import int8_gemv

    inputs = Case((3,), 20, 4, torch.float32).build(device)
    with pytest.raises(ValueError, match="x has 3 rows, int8_gemv takes at most 2; use int8_linear"):
        int8_gemv.int8_gemv(*inputs)
    assert max(int8_gemv._TILES) >= dispatch.GEMV_MAX_ROWS


@pytest.mark.gpu
@each_dtype
@pytest.mark.parametrize("rows", (1, 2))
def test_a_model_s_size(dtype: torch.dtype, rows: int) -> None:
    from squareq_fx.kernels.int8_gemv import int8_gemv

    for outer, inner in ((18432, 3072), (3072, 12288)):
        inputs = Case((rows,), inner, outer, dtype).build("cuda")
        y = int8_gemv(*inputs)
        assert_accurate(y, inputs)
        assert all(torch.equal(int8_gemv(*inputs), y) for _ in range(4))
