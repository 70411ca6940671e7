"""The row dequantisation kernel equals reference.dequantize bit for bit; on CUDA and interpreted."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_cases import DTYPES, INTERPRETED, Case

from squareq_fx.kernels import reference

DEVICES = ["cpu"] if INTERPRETED else [pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES)
@given(
    outer=st.integers(0, 20),
    inner=st.integers(0, 300),
    dtype=st.sampled_from(DTYPES),
    pack_k=st.sampled_from((1, 16, 64)),
    zero_points=st.booleans(),
    tile=st.sampled_from((None, (16, 64, 4), (1, 512, 2))),
)
def test_equals_the_reference(
    device: str,
    outer: int,
    inner: int,
    dtype: torch.dtype,
    pack_k: int,
    zero_points: bool,
    tile: tuple | None,
) -> None:
    from squareq_fx.kernels.dequantize_rows import dequantize_rows

    case = Case((1,), inner, outer, torch.float32, pack_k, zero_points, seed=outer)
    _, *layer, _ = case.build(device)
    got = dequantize_rows(*layer, inner, dtype, tile)
    expected = reference.dequantize(*layer, inner, dtype)
    assert got.dtype == dtype and got.is_contiguous() and torch.equal(got, expected)


@pytest.mark.parametrize("device", DEVICES)
@given(
    outer=st.integers(0, 20),
    inner=st.integers(0, 600),
    dtype=st.sampled_from(DTYPES),
    with_bias=st.booleans(),
    strided=st.booleans(),
)
def test_a_layer_is_its_weight_and_its_rounded_bias(
    device: str, outer: int, inner: int, dtype: torch.dtype, with_bias: bool, strided: bool
) -> None:
    from squareq_fx.kernels.dequantize_rows import launch, launch_layer

    _, *layer, _ = Case((1,), inner, outer, torch.float32, 16, True, seed=outer).build(device)
    bias = torch.randn(2 * outer, generator=torch.Generator().manual_seed(inner)).to(device) * 1e5  # past fp16's range too
    bias = bias[::2] if strided else bias[:outer]
    weight, rounded = launch_layer(*layer, bias if with_bias else None, inner, dtype)
    assert torch.equal(weight, launch(*layer, inner, dtype))
    assert (rounded is not None) == with_bias
    if rounded is not None:
        assert rounded.dtype == dtype and torch.equal(rounded, bias.to(dtype))


@pytest.mark.parametrize("device", DEVICES)
def test_takes_a_narrower_width_and_views(device: str) -> None:
    from squareq_fx.kernels.dequantize_rows import dequantize_rows

    _, qweight, scale, zero_point, _ = Case((1,), 100, 12, torch.float32, zero_points=True).build(device)
    for view in (qweight[:, 3:60], qweight[::2].t().contiguous().t(), qweight[1::2]):
        vectors = scale[: view.shape[0]], zero_point[-view.shape[0] :]
        for width in (view.shape[1], 17, 1, 0):
            got = dequantize_rows(view, *vectors, width, torch.float32)
            assert torch.equal(got, reference.dequantize(view, *vectors, width))


@pytest.mark.parametrize("device", DEVICES)
def test_refuses_what_it_cannot_take(device: str) -> None:
    from squareq_fx.kernels.dequantize_rows import dequantize_rows

    _, qweight, scale, zero_point, _ = Case((1,), 100, 12, torch.float32).build(device)
    with pytest.raises(ValueError, match="in_features must lie between 0 and qweight's width 128"):
        dequantize_rows(qweight, scale, zero_point, 129, torch.float32)
    with pytest.raises(TypeError, match="dtype must be float16"):
        dequantize_rows(qweight, scale, zero_point, 100, torch.int8)
    with pytest.raises(ValueError, match="scale must have shape"):
        dequantize_rows(qweight, scale[1:], zero_point, 100, torch.float32)
