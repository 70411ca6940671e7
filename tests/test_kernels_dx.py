"""int8_linear_dx, the gradient of an int8 layer by its input: on the CPU, on CUDA, and interpreted."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from kernel_cases import INTERPRETED, Case, cases, laid_out, relative

from squareq_fx.kernels import dispatch, reference

DEVICES = ["cpu"] if INTERPRETED else ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def _inputs(case: Case, device: str) -> tuple[torch.Tensor, ...]:
    """dy [..., out] in the case's layout, and the layer."""
    _, *layer, _ = replace(case, layout="contiguous").build(device)
    generator = torch.Generator().manual_seed(case.seed + 1)
    dy = torch.randn((*case.rows, case.outer), generator=generator).to(device, case.dtype)
    return laid_out(dy, case.layout), *layer


@pytest.mark.parametrize("device", DEVICES)
@given(case=cases())
def test_accuracy(device: str, case: Case) -> None:
    dy, *layer = _inputs(case, device)
    dx = dispatch.int8_linear_dx(dy, *layer, case.inner)
    assert dx.shape == (*case.rows, case.inner) and dx.dtype == dy.dtype and dx.device == dy.device
    if dx.numel() == 0:
        return
    weight = reference.dequantize(*layer, case.inner)
    exact = (dy.double() @ weight.double()).cpu()
    theirs = relative(torch.matmul(dy, weight.to(dy.dtype)), exact)
    assert relative(dx, exact) < 2 * theirs + 1e-6
    assert torch.equal(dx, dispatch.int8_linear_dx(dy, *layer, case.inner)), "two calls differ"


@given(case=cases())
def test_the_reference_is_the_gradient_of_the_reference(case: Case) -> None:
    x, *layer = replace(case, dtype=torch.float32).build("cpu")[:4]
    x = x.detach().clone().requires_grad_()
    y = reference.int8_linear(x, *layer)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(case.seed))
    (expected,) = torch.autograd.grad(y, x, dy)
    assert torch.allclose(reference.int8_linear_dx(dy, *layer, x.shape[-1]), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"dy": torch.zeros(2, 5, dtype=torch.int32)}, TypeError, "dy must be"),
        ({"dy": torch.zeros(2, 4)}, ValueError, r"dy must be \[..., 5\]"),
        ({"dy": torch.tensor(1.0)}, ValueError, "dy must be"),
        ({"qweight": torch.zeros(5, 64)}, TypeError, "qweight must be int8"),
        ({"in_features": 65}, ValueError, "in_features"),
        ({"scale": torch.zeros(4)}, ValueError, "scale must have shape"),
    ],
)
def test_wrong_arguments_are_named(change: dict, error: type[Exception], message: str) -> None:
    qweight, scale, zero = reference.quantize_weight(torch.randn(5, 40))
    arguments = {"dy": torch.zeros(2, 5), "qweight": qweight, "scale": scale, "zero_point": zero, "in_features": 40}
    for function in (dispatch.int8_linear_dx, reference.int8_linear_dx):
        with pytest.raises(error, match=message):
            function(**{**arguments, **change})
