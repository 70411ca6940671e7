"""The layers that `kernels.py` runs, what it wants of them, and whether their results are right."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from squareq_fx.kernels import dispatch, reference

__all__ = [
    "DEQUANTISED",
    "FEW_ROWS",
    "MANY_ROWS",
    "ODD_SHAPES",
    "OTHER_ROWS",
    "SIDE_BY_SIDE",
    "TINY",
    "W8A8",
    "Layer",
    "Verdict",
    "arguments",
    "check",
    "check_odd_shapes",
    "float_weights",
]

Inputs = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class Layer:
    """M rows, an N x K weight, and how many times as fast as torch's linear in the same dtype it is to be; None: no matter."""

    m: int
    n: int
    k: int
    target: float | None = None
    parts: int = 1
    dtype: torch.dtype = torch.bfloat16

    def __str__(self) -> str:
        extra = f", {self.parts} layers" if self.parts > 1 else ""
        return f"{self.m}x{self.n}x{self.k}{extra}" + (", float32" if self.dtype == torch.float32 else "")

    @property
    def nbytes(self) -> int:
        """Of an int8 weight, its input and its result."""
        return self.n * self.k + self.dtype.itemsize * self.m * (self.n + self.k)


_FLUX = ((3072, 3072), (12288, 3072), (3072, 12288))
MANY_ROWS = (
    Layer(4608, 3072, 3072, 0.93),
    Layer(4608, 12288, 3072, 0.93),
    Layer(4608, 3072, 15360, 0.93),
    Layer(16384, 3072, 3072, 0.93),
    Layer(4096, 3072, 12288, 0.93),
)
FEW_ROWS = (*(Layer(m, n, k, 1.5) for n, k in _FLUX for m in (1, 2, 4, 8, 16)), Layer(1, 18432, 3072, 1.5))
OTHER_ROWS = (
    *(Layer(m, n, k) for n, k in _FLUX for m in (32, 64)),
    *(Layer(m, 3072, 3072) for m in (128, 256)),
    *(Layer(m, 3072, 3072, dtype=torch.float32) for m in (1, 16)),
)
"""For information: where the fused kernel ends (`dispatch.FUSED_MAX_ROWS`)."""
W8A8 = (
    Layer(4608, 12288, 3072, 1.5),
    Layer(4608, 3072, 15360, 1.5),
    Layer(16384, 3072, 3072, 1.5),
    Layer(4608, 3072, 3072, 1.35),
    Layer(8192, 640, 640, 1.0),
    Layer(8192, 1920, 640, 1.0, parts=3),
    Layer(8192, 5120, 640, 1.0),
    Layer(8192, 640, 2560, 1.0),
    Layer(2048, 1280, 1280, 1.0),
    Layer(2048, 3840, 1280, 1.0, parts=3),
    Layer(2048, 10240, 1280, 1.0),
    Layer(2048, 1280, 5120, 1.0),
)
DEQUANTISED = ((3072, 3072), (12288, 3072), (3072, 15360), (10240, 1280))
"""N, K of Flux and SDXL."""
TINY = {
    "MANY_ROWS": (Layer(48, 64, 96, 0.93),),
    "FEW_ROWS": (Layer(1, 64, 96, 1.5), Layer(4, 64, 96, 1.5)),
    "OTHER_ROWS": (Layer(32, 64, 96), Layer(1, 64, 96, dtype=torch.float32)),
    "W8A8": (Layer(48, 64, 96, 1.5), Layer(48, 96, 64, 1.0, parts=3)),
    "DEQUANTISED": ((64, 96),),
    "ODD_SHAPES": ((1, 1, 1), (17, 33, 100)),
    "SIDE_BY_SIDE": ((48, 96, 128),),
}
"""Toys for the CPU."""
SIDE_BY_SIDE = ((4608, 3072, 12288), (512, 3072, 12288))
"""Rows, columns of attention and of the feed-forward: Flux's single blocks."""
ODD_SHAPES = ((1, 1, 1), (17, 33, 100), (130, 511, 1000))


def arguments(layer: Layer, device: torch.device, zero_points: bool = False) -> Inputs:
    """x [m, k], qweight, scale, zero_point, bias, random."""
    weight = torch.randn(layer.n, layer.k, device=device) * 0.05
    qweight, scale, zero_point = reference.quantize_weight(weight)
    if zero_points:
        zero_point = torch.randint(-20, 21, (layer.n,), device=device).float()
    x = torch.randn(layer.m, layer.k, device=device).to(layer.dtype)
    return x, qweight, scale, zero_point, torch.randn(layer.n, device=device)


def float_weights(inputs: Inputs) -> Inputs:
    """x, weight and bias of torch's linear in x's dtype."""
    x, *rest, bias = inputs
    return x, reference.dequantize(*rest, x.shape[1], x.dtype), bias.to(x.dtype)


@dataclass(frozen=True)
class Verdict:
    """Of one result: its relative L2 error, torch's, both against float64, and whether five runs gave the same bits."""

    what: str
    error: float
    torch_error: float
    stable: bool

    @property
    def share(self) -> float:
        """Of the error that is allowed: twice torch's and 1e-6."""
        return self.error / (2 * self.torch_error + 1e-6)

    @property
    def good(self) -> bool:
        return self.stable and self.share < 1


def check(layer: Layer, inputs: Inputs, compute: str) -> Verdict:
    """The result that a layer gets, as it is dispatched. In w8a8, what came of quantising the rows counts as x: the rows
    themselves must be the definition's, bit for bit.
    """
    x, qweight, scale, zero_point, bias = inputs
    steps = qweight[:, : layer.k].double() - zero_point.double()[:, None]
    weight = steps * scale.double()[:, None]
    if compute == "w8a16":
        runs = [dispatch.int8_linear(*inputs) for _ in range(5)]
        rows = x.double()
        equal = True
    else:
        xq, sx = dispatch.quantize_rows(x)
        runs = [_joined(dispatch.int8_matmul(xq, sx, *inputs[1:], x.dtype, parts=layer.parts)) for _ in range(5)]
        rows = xq.double() * sx[:, :1].double()
        equal = all(torch.equal(got, want) for got, want in zip((xq, sx), reference.quantize_rows(x), strict=True))
    exact = rows @ weight.t() + bias.double()
    theirs = F.linear(rows.to(x.dtype), weight.to(x.dtype), bias.to(x.dtype))
    ours, torchs = (float((got.double() - exact).norm() / exact.norm()) for got in (runs[0], theirs))
    stable = all(torch.equal(runs[0], run) for run in runs[1:])
    return Verdict(f"{layer}, {compute}" + ("" if equal else ", ROWS DIFFER"), ours if equal else float("inf"), torchs, stable)


def _joined(y: torch.Tensor) -> torch.Tensor:
    return y.movedim(0, 1).flatten(1) if y.dim() == 3 else y


def check_odd_shapes(device: torch.device, shapes: Sequence[tuple[int, int, int]] = ODD_SHAPES) -> list[Verdict]:
    """Shapes that no tile divides, with and without zero points; tests/test_kernels_*.py try many more."""
    found = []
    for dtype in (torch.bfloat16, torch.float32):
        for m, n, k in shapes:
            layer = Layer(m, n, k, dtype=dtype)
            for zero_points in (False, True):
                inputs = arguments(layer, device, zero_points)
                found += [check(layer, inputs, compute) for compute in ("w8a16", "w8a8")]
    return found
