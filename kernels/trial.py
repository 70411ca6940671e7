"""A kernel on random arguments of one shape, to be timed with one tile after another."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

import torch

from squareq_fx.kernels.reference import packed_width
from squareq_fx.kernels.tiles import FusedTile, MatmulTile, row_bucket

__all__ = ["trial"]


def trial(
    kernel: str, rows: int, width: int, depth: int, dtype: torch.dtype, device: torch.device
) -> Callable[[FusedTile | MatmulTile], torch.Tensor]:
    """A function of the tile that launches a kernel of `tiles` once; its arguments stay the same.

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
    if kernel == "int8_linear":
        x = torch.randn(rows, depth, generator=generator, device=device).to(dtype)
        return lambda tile: run.int8_linear(x, qweight, scale, zero, bias, tile)
    xq, sx = bytes_of(rows, depth), torch.ones(rows, 2, device=device)
    return lambda tile: run.launch(xq, sx, qweight, scale, zero, bias, dtype, tile=tile)
