"""Triton: how the fused W8A16 products end: zero point, scale, bias, one rounding."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["finish", "of_columns"]


@triton.jit
def of_columns(zero_ptr, scale_ptr, bias_ptr, rows_n):
    """Zero points, scales and biases. To be asked for before the product: after it, all would wait for them."""
    zero = tl.load(zero_ptr + rows_n)
    scale = tl.load(scale_ptr + rows_n)
    bias = scale  # of no use without bias_ptr; Triton 3.6 cannot return None
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + rows_n)
    return zero, scale, bias


@triton.jit
def finish(
    acc,
    x_ptr,
    zero,
    scale,
    bias,
    bias_ptr,
    y_ptr,
    offs_m,
    offs_n,
    rows_m,
    M,
    N,
    K,
    stride_xm,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Store a tile.

    Args:
        acc: [columns of y, rows of y] float32, the tile transposed: the sums of x * q, or for float32 of x * (q - zero).
        zero, scale, bias: of `of_columns`, bias only if there is a bias_ptr.
        offs_m, offs_n: places in y; rows_m: offs_m, but 0 past the end.
    """
    inside_m = offs_m < M
    # q - zero need not fit 16 bits, so it comes in by linearity; a symmetric slab skips this pass over x.
    if x_ptr.dtype.element_ty != tl.float32:  # noqa: SIM102  (decided when compiling, the inner one by the data)
        if tl.sum((zero != 0.0).to(tl.int32), axis=0) > 0:
            offs_k = tl.arange(0, BLOCK_K)
            x_tile = x_ptr + rows_m[None, :] * stride_xm + offs_k[:, None]
            total = tl.zeros((BLOCK_M,), dtype=tl.float32)
            for k in range(0, K, BLOCK_K):
                x = tl.load(x_tile + k, mask=inside_m[None, :] & (offs_k[:, None] < K - k), other=0.0)
                total += tl.sum(x.to(tl.float32), axis=0)
            acc -= zero[:, None] * total[None, :]
    acc *= scale[:, None]
    if bias_ptr is not None:
        acc += bias[:, None]
    y_tile = y_ptr + offs_m.to(tl.int64)[:, None] * N + offs_n[None, :]
    tl.store(y_tile, tl.trans(acc).to(y_ptr.dtype.element_ty), mask=inside_m[:, None] & (offs_n < N)[None, :])
