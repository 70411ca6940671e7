"""Every implementation of int8_linear against the exact answer, and gate 5.

The same bodies run on the CPU, on CUDA (marker gpu), and interpreted (tests/test_kernels_interpreter.py).
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import assume, given
from kernel_cases import (
    DTYPES,
    INTERPRETED,
    Case,
    assert_accurate,
    cases,
    exact_linear,
    implementations,
    laid_out,
    relative,
    torch_linear,
)

from squareq_fx.kernels import cpu, dispatch, reference

Linear = Callable[..., torch.Tensor]
each_implementation = pytest.mark.parametrize(("device", "linear"), implementations())
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@each_implementation
@given(case=cases(largest=33 if INTERPRETED else 70))
def test_odd_shapes_dtypes_zero_points_padding_and_strides(device: str, linear: Linear, case: Case) -> None:
    inputs = case.build(device)
    assert_accurate(linear(*inputs), inputs)


@each_implementation
@each_dtype
@pytest.mark.parametrize("batch", (1, 4, 16, 64, 256))
def test_gate5_batches_equal_dequantise_then_matmul(
    device: str, linear: Linear, dtype: torch.dtype, batch: int
) -> None:
    inputs = Case((batch,), 100, 48, dtype, seed=batch).build(device)
    assert inputs[1].shape == (48, 128)  # in = 100, padded to 128
    y = linear(*inputs)
    assert_accurate(y, inputs)
    weight = reference.dequantize(*inputs[1:4], 100)
    expected = torch.nn.functional.linear(inputs[0].float(), weight, inputs[4])
    # bfloat16 carries eight bits: rounding the result alone costs 1.7e-3, rounding the weight as much again.
    assert relative(y, expected.double().cpu()) < (4e-3 if dtype == torch.bfloat16 else 1e-3)


@each_implementation
@each_dtype
def test_gate5_tiny_weights_and_hundredfold_inputs(device: str, linear: Linear, dtype: torch.dtype) -> None:
    x, *layer = Case((16,), 100, 48, dtype, bias=False).build(device)
    assert_accurate(linear(100 * x, *layer), (100 * x, *layer))
    weight = torch.randn(48, 100, device=device) * 1e-6
    tiny = (x, *reference.quantize_weight(weight), None)
    assert_accurate(linear(*tiny), tiny)
    nothing = (x, *reference.quantize_weight(weight * 0), None)
    assert not linear(*nothing).any()


@each_implementation
@each_dtype
def test_gate5_bias_adds_exactly(device: str, linear: Linear, dtype: torch.dtype) -> None:
    x, *layer, bias = Case((7,), 100, 48, dtype, zero_points=True).build(device)
    assert torch.equal(linear(0 * x, *layer, bias), bias.to(dtype).expand(7, 48))
    without, beside = linear(x, *layer, None), linear(x, *layer, bias)
    # One rounding of each of the three to x's dtype, and float32 additions that may come in another order.
    step = torch.finfo(dtype).eps * (without.float().abs() + beside.float().abs() + bias.abs())
    terms = x.float().abs() @ reference.dequantize(*layer, 100).abs().t()
    slack = 4 * torch.finfo(torch.float32).eps * terms
    assert ((beside.float() - without.float() - bias).abs() <= step + slack).all()


@each_implementation
@each_dtype
@pytest.mark.parametrize("batch", (1, 33 if INTERPRETED else 130))
def test_gate5_five_runs_return_the_same_bits(
    device: str, linear: Linear, dtype: torch.dtype, batch: int
) -> None:
    inputs = Case((batch,), 200, 40, dtype, zero_points=True).build(device)
    first = linear(*inputs)
    assert first.isfinite().all()
    assert all(torch.equal(linear(*inputs), first) for _ in range(4))


@each_implementation
@pytest.mark.parametrize("layout", ("transposed", "sliced", "strided"))
def test_strides_do_not_change_the_result(device: str, linear: Linear, layout: str) -> None:
    """Up to the order of a BLAS's additions, which may follow the strides; one layout has one result."""
    x, *layer = Case((2, 3, 4), 40, 9, torch.float32).build(device)
    view = laid_out(x, layout)
    assert torch.equal(view, x) and not view.is_contiguous()
    torch.testing.assert_close(linear(view, *layer), linear(x, *layer), rtol=1e-5, atol=1e-6)
    assert torch.equal(linear(view, *layer), linear(view, *layer))


@each_implementation
@each_dtype
@pytest.mark.parametrize("rows", ((0,), (2, 0), (0, 3)))
def test_an_empty_batch_gives_an_empty_result(
    device: str, linear: Linear, dtype: torch.dtype, rows: tuple[int, ...]
) -> None:
    inputs = Case(rows, 20, 6, dtype).build(device)
    y = linear(*inputs)
    assert y.shape == (*rows, 6) and y.dtype == dtype


@each_implementation
def test_degenerate_widths(device: str, linear: Linear) -> None:
    no_inputs = Case((3,), 0, 6, torch.float32).build(device)
    assert torch.equal(linear(*no_inputs), no_inputs[4].expand(3, 6))
    assert linear(*no_inputs[:4], None).tolist() == [[0.0] * 6] * 3
    assert linear(*Case((3,), 8, 0, torch.float32).build(device)).shape == (3, 0)
    assert linear(*Case((), 8, 5, torch.float32).build(device)).shape == (5,)


@each_implementation
def test_a_weight_and_its_vectors_may_be_views(device: str, linear: Linear) -> None:
    x, qweight, scale, zero_point, bias = Case((5,), 30, 12, torch.float32, zero_points=True).build(device)
    views = (qweight[::2], scale[::2], zero_point[::2], bias[::2])
    copies = tuple(view.contiguous() for view in views)
    assert torch.equal(linear(x, *views), linear(x, *copies))
    columns = qweight.t().contiguous().t()
    turned, straight = (linear(x, q, scale, zero_point, bias) for q in (columns, qweight))
    torch.testing.assert_close(turned, straight, rtol=1e-5, atol=1e-6)  # a BLAS on several threads follows the strides


@each_implementation
@each_dtype
def test_zero_points_that_almost_cancel(device: str, linear: Linear, dtype: torch.dtype) -> None:
    """An asymmetric layer on inputs far from zero: the two large terms differ by little."""
    x, qweight, scale, _, bias = Case((8,), 150, 20, dtype).build(device)
    shifted = (qweight[:, :150].float() / 2 + 60).round().to(torch.int8)
    inputs = (x + 2, shifted, scale, torch.full_like(scale, 60.0), bias)
    assert_accurate(linear(*inputs), inputs)


@each_implementation
def test_nan_in_one_row_stays_in_that_row(device: str, linear: Linear) -> None:
    x, *layer = Case((20,), 100, 40, torch.float32).build(device)
    x[3, 50] = float("nan")
    bad = linear(x, *layer).isnan()
    assert bad[3].all() and not bad[:3].any() and not bad[4:].any()


if not INTERPRETED:

    @given(case=cases())
    def test_the_cpu_path_is_as_close_as_torch_in_every_dtype(case: Case) -> None:
        """Stricter than the rule: 1e-5 in float32; rounding once, no worse than torch in 16 bits."""
        inputs = case.build("cpu")
        exact = exact_linear(*inputs)
        assume(exact.numel() >= 16)
        ours = relative(cpu.int8_linear(*inputs), exact)
        if case.dtype == torch.float32:
            assert ours < 1e-5
        else:
            assert ours <= 1.01 * relative(torch_linear(*inputs), exact)

    def test_sliced_and_whole_weights_agree_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
        inputs = Case((9,), 100, 70, torch.float32, zero_points=True).build("cpu")
        whole = cpu.int8_linear(*inputs)
        for elements in (1, 300, 3300):
            monkeypatch.setattr(cpu, "SLICE_ELEMENTS", elements)
            torch.testing.assert_close(cpu.int8_linear(*inputs), whole, rtol=1e-5, atol=1e-5)

    @each_dtype
    def test_gate3_no_float_temporary_of_the_weights_size_on_the_cpu(dtype: torch.dtype) -> None:
        from torch.utils._python_dispatch import TorchDispatchMode

        class Largest(TorchDispatchMode):
            floats = 0

            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                out = func(*args, **(kwargs or {}))
                if isinstance(out, torch.Tensor) and out.is_floating_point():
                    self.floats = max(self.floats, out.numel())
                return out

        inputs = Case((4,), 1024, 2048, dtype).build("cpu")
        with Largest() as largest:
            dispatch.int8_linear(*inputs)
        assert 0 < largest.floats <= cpu.SLICE_ELEMENTS < inputs[1].numel() / 2

    @pytest.mark.gpu
    @each_dtype
    def test_dispatch_crosses_over_without_a_seam(dtype: torch.dtype) -> None:
        limit = dispatch.FUSED_MAX_ROWS[dtype]
        for rows in (limit, limit + 1):
            inputs = Case((rows,), 256, 96, dtype, zero_points=True).build("cuda")
            assert_accurate(dispatch.int8_linear(*inputs), inputs)
