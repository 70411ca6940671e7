"""A kernel on random arguments of one shape, to be timed with one tile after another, and looked at."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module

import torch

from squareq_fx.kernels.reference import packed_width
from squareq_fx.kernels.tiles import FusedTile, MatmulTile, row_bucket

__all__ = ["Trial", "trial"]

_ENOUGH_ROWS = 128
"""The first and the last so many rows of a result are looked at."""
_TOLERANCE = 2e-2
"""Relative L2 error: rounding to 16 bits leaves a tenth of it, a tile that was computed wrongly more."""


@dataclass(frozen=True)
class Trial:
    """`run` launches a kernel of `tiles` once with a tile; its arguments stay the same.

    Attributes:
        left, right: their product is the result, as far as its first and last rows go: float32.
    """

    run: Callable[[FusedTile | MatmulTile], torch.Tensor]
    left: torch.Tensor
    right: torch.Tensor

    def __call__(self, tile: FusedTile | MatmulTile) -> torch.Tensor:
        return self.run(tile)

    def is_right(self, y: torch.Tensor) -> bool:
        """Whether a result is the product, within rounding."""
        expected = self.left @ self.right.t()
        error = (_ends(y).to(torch.float32) - expected).norm() / expected.norm()
        return bool(error < _TOLERANCE)  # NaN is not


def trial(kernel: str, rows: int, width: int, depth: int, dtype: torch.dtype, device: torch.device) -> Trial:
    """The trial of one shape.

    Args:
        kernel: "int8_linear" or "int8_matmul".
        rows: rounded up to their bucket.

    Raises:
        ValueError: no such kernel chooses its tile.
        RuntimeError: Triton is missing.
    """
    if kernel not in ("int8_linear", "int8_matmul"):
        raise ValueError(f"{kernel!r} has no tiles to choose from; int8_linear and int8_matmul have")
    rows = row_bucket(rows)
    generator = torch.Generator(device).manual_seed(0)

    def bytes_of(*shape: int) -> torch.Tensor:
        return torch.randint(-127, 128, shape, generator=generator, device=device, dtype=torch.int8)

    qweight = bytes_of(width, packed_width(depth))
    scale = torch.full((width,), 1e-3, device=device)
    zero, bias = torch.zeros_like(scale), torch.zeros_like(scale)
    run = import_module(f"squareq_fx.kernels.{kernel}")
    right = qweight[:, :depth].to(torch.float32) * 1e-3
    if kernel == "int8_linear":
        x = torch.randn(rows, depth, generator=generator, device=device).to(dtype)
        return Trial(lambda tile: run.int8_linear(x, qweight, scale, zero, bias, tile), _ends(x).to(torch.float32), right)
    xq, sx = bytes_of(rows, depth), torch.ones(rows, 2, device=device)
    left = _ends(xq).to(torch.float32)
    return Trial(lambda tile: run.launch(xq, sx, qweight, scale, zero, bias, dtype, tile=tile), left, right)


def _ends(x: torch.Tensor) -> torch.Tensor:
    return x if len(x) <= 2 * _ENOUGH_ROWS else torch.cat((x[:_ENOUGH_ROWS], x[-_ENOUGH_ROWS:]))
