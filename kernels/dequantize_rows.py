"""Triton: int8 rows to a float weight at memory speed, for the products that cuBLAS does better."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from squareq_fx.kernels.arguments import check_rows
from squareq_fx.kernels.launch import Launcher, stored_dtype
from squareq_fx.kernels.tiles import cdiv

__all__ = ["TILES", "Tile", "dequantize_rows", "launch", "launch_layer"]

Tile = tuple[int, int, int]
"""(rows, columns, warps) of one program."""

TILES: dict[torch.dtype, Tile] = {
    torch.bfloat16: (8, 256, 4),
    torch.float16: (8, 256, 4),
    torch.float32: (2, 256, 4),
}
"""The best of `benchmarks/kernels.py` on an H200. One or two 16-byte stores a thread, their loads in the same layout.
Narrow in columns: widths of diffusion models are multiples of 64, seldom of 1024, so little is masked."""


@triton.jit
def _dequantize_rows(
    q_ptr, scale_ptr, zero_ptr, bias_ptr, w_ptr, b_ptr, N, K, stride_qn, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr
):
    tiles_k = tl.cdiv(K, BLOCK_K)
    pid = tl.program_id(0)
    rows = (pid // tiles_k) * BLOCK_N + tl.arange(0, BLOCK_N)
    cols = (pid % tiles_k) * BLOCK_K + tl.arange(0, BLOCK_K)
    scale = tl.load(scale_ptr + rows, mask=rows < N, other=0.0)
    zero = tl.load(zero_ptr + rows, mask=rows < N, other=0.0)
    inside = (rows < N)[:, None] & (cols < K)[None, :]
    wide_rows = rows.to(tl.int64)[:, None]  # N * K may pass 2^31
    q = tl.load(q_ptr + wide_rows * stride_qn + cols[None, :], mask=inside, other=0)
    w = (q.to(tl.float32) - zero[:, None]) * scale[:, None]
    tl.store(w_ptr + wide_rows * K + cols[None, :], w.to(w_ptr.dtype.element_ty), mask=inside)
    if bias_ptr is not None:  # noqa: SIM102  (decided when compiling, the inner one by the program)
        if pid % tiles_k == 0:
            bias = tl.load(bias_ptr + rows, mask=rows < N, other=0.0)
            tl.store(b_ptr + rows, bias.to(b_ptr.dtype.element_ty), mask=rows < N)


_LAUNCH = Launcher(_dequantize_rows)


def dequantize_rows(
    qweight: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor,
    in_features: int,
    dtype: torch.dtype,
    tile: Tile | None = None,
) -> torch.Tensor:
    """(q - zero_point) * scale in float32, rounded once to dtype; equal to reference.dequantize bit for bit.

    Args:
        qweight: [out, K'] int8, rows of stride 1; scale, zero_point: [out] float32; in_features: <= K'.
        dtype: float16, bfloat16 or float32.
        tile: (rows, columns, warps) of one program, by default `TILES[dtype]`; changes the time only.
    Returns:
        [out, in_features] in dtype, contiguous.
    Raises:
        TypeError, ValueError: an argument's dtype, shape or device is wrong, naming it.
    """
    check_rows(qweight, scale, zero_point, in_features, dtype)
    return launch(qweight, scale, zero_point, in_features, dtype, tile)


def launch(
    qweight: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor,
    in_features: int,
    dtype: torch.dtype,
    tile: Tile | None = None,
) -> torch.Tensor:
    """`dequantize_rows` of arguments that were checked already; a model calls it hundreds of times a step."""
    return launch_layer(qweight, scale, zero_point, None, in_features, dtype, tile)[0]


def launch_layer(
    qweight: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor,
    bias: torch.Tensor | None,
    in_features: int,
    dtype: torch.dtype,
    tile: Tile | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`launch`, and the float32 [out] bias in dtype, rounded by the same programs: alone it would be a launch of its own."""
    _LAUNCH.check(qweight)
    if qweight.stride(1) != 1:
        qweight = qweight.contiguous()
    out_features = qweight.shape[0]
    stored = stored_dtype(dtype, _LAUNCH.interpreted)
    weight = torch.empty((out_features, in_features), dtype=stored, device=qweight.device)
    if weight.numel() == 0:
        return weight.to(dtype), None if bias is None else bias.to(dtype)
    exact = None if bias is None or dtype == torch.float32 else bias.contiguous()
    rounded = None if exact is None else torch.empty_like(exact, dtype=stored)
    block_n, block_k, warps = tile or TILES[dtype]
    _LAUNCH(
        cdiv(out_features, block_n) * cdiv(in_features, block_k),
        (qweight, scale.contiguous(), zero_point.contiguous(), exact, weight, rounded),
        (),
        (out_features, in_features, qweight.stride(0)),
        (block_n, block_k),
        num_warps=warps,
    )
    return weight.to(dtype), bias if rounded is None else rounded.to(dtype)
