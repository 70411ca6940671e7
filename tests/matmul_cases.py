"""Inputs, exact answers and implementations of int8_matmul; the rule of accuracy is kernel_cases'.

Here torch computes in the result's dtype with activations and weights that are dequantised and rounded to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import strategies as st
from kernel_cases import DTYPES, INTERPRETED, laid_out, relative

from squareq_fx.kernels import dispatch, reference, tiles
from squareq_fx.kernels.arguments import ACTIVATIONS
from squareq_fx.kernels.tiles import MatmulTile, Tail

__all__ = ["INTERPRETED_TILES", "MatmulCase", "assert_accurate", "matmul_cases", "matmul_implementations", "tiles_to_try"]

INTERPRETED_TILES = (  # whole tiles and split ones on the interpreter's four programs; one program for each tile
    MatmulTile(16, 32, 64, 4, 1, 1, Tail.DEPTH),
    MatmulTile(32, 16, 32, 4, 1, 1, Tail.ROWS, 2),
    MatmulTile(32, 16, 32, 4, 1, 1, Tail.WHOLE, -2),
    MatmulTile(16, 16, 128, 4, 1, 0, Tail.WHOLE),
)


def matmul_implementations() -> list[object]:
    """(device, function) pairs to test in this process."""
    if INTERPRETED:
        return [pytest.param("cpu", dispatch.int8_matmul, id="interpreted")]
    return [
        pytest.param("cpu", dispatch.int8_matmul, id="cpu"),
        pytest.param("cuda", dispatch.int8_matmul, id="cuda", marks=pytest.mark.gpu),
        pytest.param("cuda", _other_tile, id="tiles", marks=pytest.mark.gpu),
    ]


def tiles_to_try(rows: int, width: int, depth: int, dtype: torch.dtype, device: torch.device) -> Sequence[MatmulTile]:
    """All tiles of a shape, two that cut their last tiles whatever the depth, and those for Hopper whatever the rows."""
    if INTERPRETED:
        return INTERPRETED_TILES
    found = [t for t in tiles.candidates("int8_matmul", rows, width, depth, dtype, device) if isinstance(t, MatmulTile)]
    others = [MatmulTile(64, 64, 64, 4, 3, 2, tail) for tail in (Tail.DEPTH, Tail.ROWS)]
    if tiles._has_hopper_kernel(device):
        others += tiles._MATMUL_HOPPER
    return [*found, *others]


def _other_tile(xq: torch.Tensor, sx: torch.Tensor, qweight: torch.Tensor, *rest: object) -> torch.Tensor:
    """The kernel with a tile that varies from shape to shape."""
    from squareq_fx.kernels.int8_matmul import int8_matmul  # late: needs triton

    rows, width, depth = xq.shape[:-1].numel(), qweight.shape[0], xq.shape[-1]
    choices = tiles_to_try(rows, width, depth, rest[3], xq.device)  # type: ignore[arg-type]
    return int8_matmul(xq, sx, qweight, *rest, tile=choices[(rows + width) % len(choices)])  # type: ignore[arg-type]


@dataclass(frozen=True)
class MatmulCase:
    """One product, as a printable recipe; `outer` is the width of one part."""

    rows: tuple[int, ...]
    inner: int
    outer: int
    dtype: torch.dtype = torch.float32
    parts: int = 1
    activation: str = "none"
    addend: bool = False
    bias: bool = True
    zero_points: bool = False
    pack_k: int = 64
    layout: str = "contiguous"
    seed: int = 0

    def build(self, device: str) -> tuple:
        """All arguments of int8_matmul, on the device."""
        generator = torch.Generator().manual_seed(self.seed)
        width = self.parts * self.outer

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator)

        xq, sx = reference.quantize_rows(normal(*self.rows, self.inner) + 0.3)
        qweight, scale, zero = reference.quantize_weight(normal(width, self.inner) * 0.05, self.pack_k)
        if self.zero_points:
            some = (normal(width) > 0.5).float()  # most columns have none: both ways through the kernel in one tile
            zero = some * ((normal(width) * 12).round() + 0.5 * (self.seed % 2))
        bias = normal(width).to(device) if self.bias else None
        addend = laid_out(normal(*self.rows, width).to(device, self.dtype), self.layout) if self.addend else None
        x = laid_out(xq.to(device), self.layout) if self.layout != "sliced" else _sliced(xq.to(device))
        vectors = tuple(vector.to(device) for vector in (qweight, scale, zero))
        return x, sx.to(device), *vectors, bias, self.dtype, self.activation, addend, self.parts

    def bare(self) -> MatmulCase:
        """Without what other programs may round in another order than the reference."""
        return replace(self, activation="none", addend=False, bias=False)


def _sliced(xq: torch.Tensor) -> torch.Tensor:
    wide = xq.new_full((*xq.shape[:-1], xq.shape[-1] + 5), 99)
    wide[..., 2:-3] = xq
    return wide[..., 2:-3]


@st.composite
def matmul_cases(draw: st.DrawFn, largest: int = 70) -> MatmulCase:
    side = st.integers(1, largest)
    parts = draw(st.integers(1, 3))
    return MatmulCase(
        rows=draw(st.one_of(st.tuples(side), st.tuples(st.integers(0, 3), st.integers(0, 9)), st.just(()))),
        inner=draw(st.one_of(st.integers(1, 3 * largest), st.sampled_from((64, 128)))),
        outer=draw(st.integers(1, max(1, largest // parts))),
        dtype=draw(st.sampled_from(DTYPES)),
        parts=parts,
        activation=draw(st.sampled_from(ACTIVATIONS)),
        addend=parts == 1 and draw(st.booleans()),
        bias=draw(st.booleans()),
        zero_points=draw(st.booleans()),
        pack_k=draw(st.sampled_from((1, 16, 64))),
        layout=draw(st.sampled_from(("contiguous", "transposed", "sliced", "strided"))),
        seed=draw(st.integers(0, 2**16)),
    )


def assert_accurate(y: torch.Tensor, arguments: tuple) -> None:
    """Shape, dtype, order in memory and the rule."""
    xq, sx, qweight, scale, zero, bias, dtype, activation, addend, parts = arguments
    shape = (*xq.shape[:-1], qweight.shape[0] // parts)
    assert y.shape == (shape if parts == 1 else (parts, *shape)) and y.dtype == dtype and y.device == xq.device
    assert y.is_contiguous()
    if y.numel() == 0:
        return
    inner = xq.shape[-1]
    x = xq.double() * sx[..., :1].double()
    weight = (qweight[:, :inner].double() - zero.double()[:, None]) * scale.double()[:, None]
    exact = _finished(x, weight, bias, activation, addend, torch.float64)
    theirs = _finished(x, weight, bias, activation, addend, dtype)
    got = (y if parts == 1 else y.movedim(0, -2).flatten(-2)).double().cpu()
    ours, torchs = relative(got, exact), relative(theirs, exact)
    assert ours < 2 * torchs + 1e-6, f"relative error {ours:.3e}, torch's {torchs:.3e}"


def _finished(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str,
    addend: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    y = torch.nn.functional.linear(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))
    y = reference.activate(y, activation)
    return (y if addend is None else y + addend.to(dtype)).cpu()
