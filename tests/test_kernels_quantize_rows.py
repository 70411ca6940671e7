"""quantize_rows, activations to int8 with a step and a sum for each row: bit for bit its definition, written here once more,
in numpy. On the CPU, on CUDA (marker gpu), and interpreted."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_cases import DTYPES, INTERPRETED, laid_out

from squareq_fx.kernels import dispatch, reference

Rows = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
DEVICES = ["cpu"] if INTERPRETED else ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
each_device = pytest.mark.parametrize("device", DEVICES)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
WIDER = 16384 + 1 + 4096
"""A row that no program holds whole."""


def by_numpy(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    rows = x.float().cpu().numpy()
    top = np.abs(rows).max(axis=-1, initial=0.0)
    step = np.where(top < np.float32(1e-30), np.float32(1), top / np.float32(127)).astype(np.float32)
    q = np.clip(np.rint(rows * (np.float32(1) / step)[..., None]), -127, 127)
    return torch.from_numpy(q.astype(np.int8)), torch.from_numpy(np.stack((step, q.sum(axis=-1)), axis=-1).astype(np.float32))


def assert_equal(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    q, sx = dispatch.quantize_rows(x)
    assert q.shape == x.shape and q.dtype == torch.int8 and q.is_contiguous() and q.device == x.device
    assert sx.shape == (*x.shape[:-1], 2) and sx.dtype == torch.float32 and sx.is_contiguous() and sx.device == x.device
    for expected in (by_numpy(x), reference.quantize_rows(x.cpu())):
        assert torch.equal(sx.cpu(), expected[1]) and torch.equal(q.cpu(), expected[0])
    return q, sx[..., 0]


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@each_device
@given(
    rows=st.one_of(st.tuples(st.integers(0, 40)), st.tuples(st.integers(0, 3), st.integers(0, 9)), st.just(())),
    inner=st.one_of(st.integers(0, 300), st.sampled_from((640, 1024, 1025))),
    dtype=st.sampled_from(DTYPES),
    size=st.sampled_from((1e-35, 1e-7, 1.0, 300.0, 1e30)),
    layout=st.sampled_from(("contiguous", "transposed", "sliced", "strided")),
    seed=st.integers(0, 99),
)
def test_equals_the_definition_bit_for_bit(
    device: str, rows: tuple[int, ...], inner: int, dtype: torch.dtype, size: float, layout: str, seed: int
) -> None:
    x = (normal(*rows, inner, seed=seed) * (1.0 if dtype == torch.float16 else size)).to(device, dtype)
    q, step = assert_equal(laid_out(x, layout))
    if x.numel() and float(x.abs().amin()) > 1e-25:
        back = (q.float() * step.unsqueeze(-1) - x.float()).abs()
        assert (back <= 0.5001 * step.unsqueeze(-1)).all()
        assert (q.abs().amax(-1) == 127).all()


@each_device
@given(
    rows=st.one_of(st.tuples(st.integers(0, 20)), st.tuples(st.integers(0, 3), st.integers(0, 5)), st.just(())),
    widths=st.one_of(
        st.tuples(st.integers(0, 300), st.integers(0, 300)),
        st.sampled_from(((128, 512), (256, 70), (512, 128), (1024, 3072), (384, 1), (128, 2000))),
    ),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(("contiguous", "transposed", "sliced", "strided")),
    seed=st.integers(0, 99),
)
def test_two_side_by_side_are_one(
    device: str, rows: tuple[int, ...], widths: tuple[int, int], dtype: torch.dtype, layout: str, seed: int
) -> None:
    x, beside = (laid_out(normal(*rows, k, seed=seed + i).to(device, dtype), layout) for i, k in enumerate(widths))
    q, sx = dispatch.quantize_rows(x, beside)
    for expected in (dispatch.quantize_rows(torch.cat((x, beside), -1)), reference.quantize_rows(x.cpu(), beside.cpu())):
        assert torch.equal(q.cpu(), expected[0].cpu()) and torch.equal(sx.cpu(), expected[1].cpu())
    assert q.is_contiguous() and sx.is_contiguous()


@each_device
@each_dtype
@pytest.mark.parametrize("inner", (1, 16384, 16385, WIDER))
def test_narrow_and_wide_rows(device: str, dtype: torch.dtype, inner: int) -> None:
    assert_equal(normal(3, inner).to(device, dtype))
    assert_equal(laid_out(normal(2, inner).to(device, dtype), "sliced"))


@each_device
@pytest.mark.parametrize("columns", (6, WIDER))
def test_halves_round_to_even(device: str, columns: int) -> None:
    x = torch.zeros(1, columns)
    x[0, :6] = torch.tensor([127.0, 0.5, 1.5, 2.5, -0.5, -1.5])
    q, step = assert_equal(x.to(device))
    assert q[0, :6].tolist() == [127, 0, 2, 2, 0, -2] and step.tolist() == [1.0]


@each_device
def test_products_are_rounded_before_they_are_rounded_to_integers(device: str) -> None:
    """Where x times the reciprocal lies within float32's last bit of a half, a fused multiply and add decides otherwise."""
    rows = []
    for top in range(3, 400, 2):
        step = np.float32(top) / np.float32(127)
        halves = np.arange(-126.5, 127, 1, dtype=np.float32) * step
        rows.append(np.concatenate([[np.float32(top)], halves, np.nextafter(halves, np.float32(1e9))]))
    assert_equal(torch.from_numpy(np.stack(rows).astype(np.float32)).to(device))


@each_device
@each_dtype
def test_zeros_and_almost_zeros_have_a_step_of_one(device: str, dtype: torch.dtype) -> None:
    x = torch.zeros(4, 50)
    x[1, 3], x[2, 4], x[3] = 9e-31, -1.1e-30, -0.0
    _, step = assert_equal(x.to(device, dtype))
    assert step[[0, 1, 3]].tolist() == [1.0, 1.0, 1.0]


@each_device
@each_dtype
@pytest.mark.parametrize("columns", (70, WIDER))
@pytest.mark.parametrize("value", (float("nan"), float("inf"), -float("inf")))
def test_a_row_with_nan_or_inf_is_told_by_its_scale(device: str, dtype: torch.dtype, columns: int, value: float) -> None:
    x = normal(4, columns).to(device, dtype)
    clean = x.clone()
    x[2, columns // 2] = value
    q, sx = dispatch.quantize_rows(x)
    assert sx[:, 0].isfinite().tolist() == [True, True, False, True]
    others = dispatch.quantize_rows(clean)
    for row in (0, 1, 3):
        assert torch.equal(q[row], others[0][row]) and torch.equal(sx[row], others[1][row])
    weights = reference.quantize_weight(normal(5, columns))
    layer = tuple(tensor.to(device) for tensor in weights)
    y = dispatch.int8_matmul(q, sx, *layer, None, torch.float32)
    assert not y[2].isfinite().any() and y[[0, 1, 3]].isfinite().all()


@each_device
@pytest.mark.parametrize("shape", ((0, 5), (3, 0), (2, 0, 4), (0,)))
def test_empty(device: str, shape: tuple[int, ...]) -> None:
    q, step = assert_equal(torch.zeros(shape, device=device))
    assert q.numel() == 0 and (step == 1.0).all()


@each_device
def test_overlapping_and_reversed_dimensions(device: str) -> None:
    x = normal(1, 7).to(device)
    assert_equal(x.expand(5, 7))
    assert_equal(normal(4, 3, 5).to(device).permute(2, 0, 1))
    assert_equal(normal(4, 3, 5).to(device)[::2, 1:])


@pytest.mark.parametrize("function", [reference.quantize_rows, dispatch.quantize_rows])
def test_wrong_arguments_are_named(function: Rows) -> None:
    with pytest.raises(TypeError, match=r"beside must be torch\.float32 as x is, got torch\.bfloat16"):
        function(torch.zeros(2, 3), torch.zeros(2, 3).bfloat16())  # type: ignore[call-arg]
    with pytest.raises(ValueError, match=r"beside must be \[..., L\] with the rows of x \(2, 3\) on cpu, got \(3, 3\)"):
        function(torch.zeros(2, 3), torch.zeros(3, 3))  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="x must be float16, bfloat16 or float32, got torch.float64"):
        function(torch.zeros(2, 2, dtype=torch.float64))
    with pytest.raises(TypeError, match="x must be float16"):
        function(torch.zeros(2, 2, dtype=torch.int8))
    with pytest.raises(ValueError, match="without dimensions"):
        function(torch.tensor(1.0))


@pytest.mark.gpu
@pytest.mark.parametrize("tile", (None, (1, 4096, 1, 4), (2, 4096, 1, 8), (4, 4096, 1, 8), (4, 1024, 3, 4), (1, 256, 12, 1)))
def test_no_tile_changes_a_bit(tile: tuple[int, int, int, int] | None) -> None:
    from squareq_fx.kernels import quantize_rows

    x = normal(1023, 3072).to("cuda", torch.bfloat16)
    expected = reference.quantize_rows(x.cpu())
    q, sx = quantize_rows.launch(x, tile=quantize_rows.RowTile(*tile) if tile else None)
    assert torch.equal(q.cpu(), expected[0]) and torch.equal(sx.cpu(), expected[1])
