"""Inputs, exact answers and implementations that the kernel tests share.

The rule of every accuracy test is Liger-Kernel's: err_ours < 2 * err_torch + 1e-6, both relative L2 errors
against a float64 product with the exactly dequantised weight, where torch computes `linear` in x's dtype with
that weight rounded to x's dtype.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import pytest
import torch
from hypothesis import strategies as st

from squareq_fx.kernels import dispatch, reference, tiles

__all__ = [
    "DTYPES",
    "INTERPRETED",
    "Case",
    "assert_accurate",
    "cases",
    "exact_linear",
    "implementations",
    "laid_out",
    "relative",
    "torch_linear",
]

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Set by tests/test_kernels_interpreter.py, which runs the kernel tests once more in their own process."""

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def repair_interpreter() -> None:
    """Let Triton 3.6 interpret a loop with a run-time bound under numpy 2.4, as Triton 3.9 does.

    It calls int() on an array of one element, which numpy turned from a warning into an error.
    """
    import numpy
    from triton.runtime import interpreter

    try:
        int(numpy.zeros(1))
    except TypeError:
        patch = interpreter._patch_lang_tensor

        def patched(tensor: type, scope: object) -> None:
            patch(tensor, scope)
            scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))

        interpreter._patch_lang_tensor = patched


if INTERPRETED:
    repair_interpreter()


def implementations() -> list[object]:
    """(device, function) pairs to test in this process: Triton's interpreted, or the CPU's and CUDA's."""
    if INTERPRETED:
        return [
            pytest.param("cpu", dispatch.int8_linear, id="interpreted"),
            pytest.param("cpu", dispatch.dequantized_linear, id="interpreted-dequantized"),
        ]
    return [
        pytest.param("cpu", dispatch.int8_linear, id="cpu"),
        pytest.param("cuda", fused, id="fused", marks=pytest.mark.gpu),
        pytest.param("cuda", dispatch.dequantized_linear, id="dequantized", marks=pytest.mark.gpu),
        pytest.param("cuda", dispatch.int8_linear, id="dispatched", marks=pytest.mark.gpu),
    ]


def fused(*inputs: torch.Tensor) -> torch.Tensor:
    """The fused Triton kernel at any number of rows; the tile varies from shape to shape."""
    from squareq_fx.kernels import int8_linear  # late: needs triton

    x, width = inputs[0], inputs[1].shape[0]
    choices = tiles.candidates("int8_linear", x.shape[:-1].numel(), width, x.shape[-1], x.dtype, x.device)
    return int8_linear.int8_linear(*inputs, tile=choices[width % len(choices)])


@dataclass(frozen=True)
class Case:
    """One layer and one input, as a printable recipe."""

    rows: tuple[int, ...]
    inner: int
    outer: int
    dtype: torch.dtype
    pack_k: int = 64
    zero_points: bool = False
    bias: bool = True
    layout: str = "contiguous"
    seed: int = 0

    def build(self, device: str) -> tuple[torch.Tensor, ...]:
        """x, qweight, scale, zero_point, bias (or None), on the device."""
        generator = torch.Generator().manual_seed(self.seed)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator)

        qweight, scale, zero_point = reference.quantize_weight(
            normal(self.outer, self.inner) * 0.05, self.pack_k
        )
        if self.zero_points:
            zero_point = (normal(self.outer) * 12).round() + 0.5 * (self.seed % 2)
        bias = normal(self.outer) if self.bias else None
        x = laid_out(normal(*self.rows, self.inner).to(device, self.dtype), self.layout)
        layer = (qweight, scale, zero_point, bias)
        return (x, *(None if tensor is None else tensor.to(device) for tensor in layer))


def laid_out(x: torch.Tensor, layout: str) -> torch.Tensor:
    """The same values under other strides."""
    if layout == "transposed":
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "sliced":
        wide = x.new_full((*x.shape[:-1], x.shape[-1] + 5), float("nan"))
        wide[..., 2:-3] = x
        return wide[..., 2:-3]
    if layout == "strided":
        return x.repeat_interleave(2, dim=-1)[..., ::2]
    return x


@st.composite
def cases(draw: st.DrawFn, largest: int = 70) -> Case:
    side = st.integers(1, largest)
    return Case(
        rows=draw(st.one_of(st.tuples(side), st.tuples(st.integers(0, 3), st.integers(0, 9)), st.just(()))),
        inner=draw(st.one_of(st.integers(1, 2 * largest), st.sampled_from((64, 128)))),
        outer=draw(side),
        dtype=draw(st.sampled_from(DTYPES)),
        pack_k=draw(st.sampled_from((1, 16, 64))),
        zero_points=draw(st.booleans()),
        bias=draw(st.booleans()),
        layout=draw(st.sampled_from(("contiguous", "transposed", "sliced", "strided"))),
        seed=draw(st.integers(0, 2**16)),
    )


def exact_linear(
    x: torch.Tensor,
    qweight: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """The answer in float64, on the CPU."""
    steps = qweight[:, : x.shape[-1]].double() - zero_point.double()[:, None]
    y = x.double() @ (steps * scale.double()[:, None]).t()
    return (y if bias is None else y + bias.double()).cpu()


def relative(y: torch.Tensor, exact: torch.Tensor) -> float:
    """||y - exact|| / ||exact||."""
    return float((y.double().cpu() - exact).norm() / exact.norm().clamp(min=1e-300))


def torch_linear(
    x: torch.Tensor,
    qweight: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """torch's own linear with the dequantised weight in x's dtype."""
    weight = reference.dequantize(qweight, scale, zero_point, x.shape[-1], x.dtype)
    return torch.nn.functional.linear(x, weight, None if bias is None else bias.to(x.dtype))


def assert_accurate(y: torch.Tensor, inputs: tuple[torch.Tensor, ...]) -> None:
    """Shape, dtype and the rule of this module."""
    x, qweight = inputs[0], inputs[1]
    assert y.shape == (*x.shape[:-1], qweight.shape[0]) and y.dtype == x.dtype and y.device == x.device
    if y.numel() == 0:
        return
    exact = exact_linear(*inputs)
    ours, theirs = relative(y, exact), relative(torch_linear(*inputs), exact)
    assert ours < 2 * theirs + 1e-6, f"relative error {ours:.3e}, torch's {theirs:.3e}"
