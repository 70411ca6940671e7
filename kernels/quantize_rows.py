"""Triton: rows of activations to int8 and one scale each, in one pass over memory."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from squareq_fx.kernels.arguments import check_quantize_rows
from squareq_fx.kernels.launch import is_interpreted, launch_device
from squareq_fx.kernels.reference import SMALLEST_ROW

__all__ = ["WIDEST", "launch", "quantize_rows", "tile_for"]

WIDEST = 16384
"""Columns that one program holds in registers; a wider row is read twice."""


@triton.jit
def _to_int8(x, inverse):
    # Adding and subtracting 1.5 * 2^23 rounds to the nearest even integer, which Triton has no function for. The launch turns
    # contraction off: fused into one step, product and sum would round otherwise than the definition.
    steps = (x * inverse + 12582912.0) - 12582912.0
    return tl.minimum(tl.maximum(steps, -127.0), 127.0).to(tl.int8)


@triton.jit
def _magnitude(x):
    # As integers, magnitudes compare as they do as floats, and NaN is the largest: a maximum of floats would drop it.
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _step(magnitude, SMALLEST: tl.constexpr):
    top = magnitude.to(tl.float32, bitcast=True)
    return tl.where(top < SMALLEST, 1.0, tl.math.div_rn(top, 127.0))


@triton.jit(do_not_specialize=["M"])
def _quantize_rows(
    x_ptr, q_ptr, s_ptr, M, K, stride_xm, SMALLEST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr
):
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.arange(0, BLOCK_K)
    inside = (rows < M)[:, None] & (cols < K)[None, :]
    wide = rows.to(tl.int64)[:, None]
    x = tl.load(x_ptr + wide * stride_xm + cols[None, :], mask=inside, other=0.0, eviction_policy="evict_first").to(tl.float32)
    step = _step(tl.max(_magnitude(x), axis=1), SMALLEST)
    q = _to_int8(x, tl.math.div_rn(1.0, step)[:, None])
    tl.store(q_ptr + wide * K + cols[None, :], q, mask=inside)
    total = tl.sum(q.to(tl.int32), axis=1)
    tl.store(s_ptr + 2 * rows, step, mask=rows < M)
    tl.store(s_ptr + 2 * rows + 1, total.to(tl.float32), mask=rows < M)


@triton.jit(do_not_specialize=["M"])
def _quantize_wide_rows(x_ptr, q_ptr, s_ptr, M, K, stride_xm, SMALLEST: tl.constexpr, BLOCK_K: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK_K)
    top = tl.zeros((BLOCK_K,), dtype=tl.int32)
    for k in range(0, K, BLOCK_K):
        x = tl.load(x_ptr + row * stride_xm + k + cols, mask=cols < K - k, other=0.0).to(tl.float32)
        top = tl.maximum(top, _magnitude(x))
    step = _step(tl.max(top, axis=0), SMALLEST)
    inverse = tl.math.div_rn(1.0, step)
    total = tl.zeros((BLOCK_K,), dtype=tl.int32)
    for k in range(0, K, BLOCK_K):
        x = tl.load(x_ptr + row * stride_xm + k + cols, mask=cols < K - k, other=0.0).to(tl.float32)
        q = _to_int8(x, inverse)
        total += q.to(tl.int32)
        tl.store(q_ptr + row * K + k + cols, q, mask=cols < K - k)
    tl.store(s_ptr + 2 * row, step)
    tl.store(s_ptr + 2 * row + 1, tl.sum(total, axis=0).to(tl.float32))


INTERPRETED = is_interpreted(_quantize_rows)


def tile_for(columns: int) -> tuple[int, int, int]:
    """(rows, columns, warps) of one program for rows of that many columns: the best of four to ten each on an H200."""
    width = max(16, triton.next_power_of_2(columns))
    height = max(1, 1024 // width)
    return height, width, 1 if width <= 1024 else 2 if width <= 4096 else 4


def quantize_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """reference.quantize_rows bit for bit.

    Args:
        x: [..., K] bf16, fp16 or fp32, any strides.
    Returns:
        xq int8 [..., K], contiguous; sx float32 [..., 2], step and sum of each row.
    Raises:
        TypeError, ValueError: x has another dtype, no dimension, or is not on a CUDA device.
    """
    check_quantize_rows(x)
    return launch(x)


def launch(x: torch.Tensor, tile: tuple[int, int, int] | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """`quantize_rows` of an argument that was checked already; tile: (rows, columns, warps), for measuring."""
    columns, rows = x.shape[-1], x.shape[:-1].numel()
    q = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    scale = torch.empty((*x.shape[:-1], 2), dtype=torch.float32, device=x.device)
    if x.numel() == 0:
        scale[..., 0], scale[..., 1] = 1.0, 0.0
        return q, scale
    x2 = x.reshape(rows, columns)
    if x2.stride(1) != 1:
        x2 = x2.contiguous()
    with launch_device(x, INTERPRETED):
        if columns > WIDEST:
            _quantize_wide_rows[(rows,)](
                x2, q, scale, rows, columns, x2.stride(0), SMALLEST_ROW, 4096, num_warps=8, enable_fp_fusion=False
            )
        else:
            height, width, warps = tile or tile_for(columns)
            grid = (triton.cdiv(rows, height),)
            _quantize_rows[grid](
                x2, q, scale, rows, columns, x2.stride(0), SMALLEST_ROW, height, width, num_warps=warps, enable_fp_fusion=False
            )
    return q, scale
