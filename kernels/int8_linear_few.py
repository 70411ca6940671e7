"""Triton: the fused W8A16 product of few rows, each tile's depth shared out among the warps of one program.

A product of a few rows is a question of how many loads are under way, of which a tile of few rows and columns has too few.
`int8_linear` lets several programs share a tile, which then wait for each other through memory. Here each warp multiplies a
piece of its own, as one matrix of a batch, and the pieces' sums meet in shared memory.
"""

from __future__ import annotations

import triton
import triton.language as tl

from squareq_fx.kernels.int8_linear_parts import finish, of_columns
from squareq_fx.kernels.launch import Launcher

__all__ = ["LAUNCH"]


@triton.jit(do_not_specialize=["M"])
def _int8_linear_few(
    x_ptr,
    q_ptr,
    scale_ptr,
    zero_ptr,
    bias_ptr,
    y_ptr,
    M,
    N,
    K,
    packed_k,
    stride_xm,
    stride_qn,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PIECES: tl.constexpr,
    EVEN_K: tl.constexpr,
    WIDEN: tl.constexpr,
):
    pid = tl.program_id(0)
    tiles_n = tl.cdiv(N, BLOCK_N)
    offs_m = pid // tiles_n * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    pieces = tl.arange(0, PIECES)[:, None, None] * BLOCK_K
    deep_x = pieces + tl.arange(0, BLOCK_K)[None, :, None]
    deep_q = pieces + tl.arange(0, BLOCK_K)[None, None, :]
    # A weight row past the end reads row 0 and is not stored; a row of x past the end is not read at all.
    inside_m = (offs_m < M)[None, None, :]
    rows_m = tl.where(offs_m < M, offs_m, 0).to(tl.int64)
    rows_n = tl.where(offs_n < N, offs_n, 0).to(tl.int64)
    x_tile = x_ptr + rows_m[None, None, :] * stride_xm + deep_x
    q_tile = q_ptr + rows_n[None, :, None] * stride_qn + deep_q
    zero, scale, bias = of_columns(zero_ptr, scale_ptr, bias_ptr, rows_n)

    acc = tl.zeros((PIECES, BLOCK_N, BLOCK_M), dtype=tl.float32)
    for k in range(0, K, PIECES * BLOCK_K):
        if EVEN_K:
            x = tl.load(x_tile + k, mask=inside_m, other=0.0)
            q = tl.load(q_tile + k)
        else:
            x = tl.load(x_tile + k, mask=inside_m & (deep_x < K - k), other=0.0)
            q = tl.load(q_tile + k, mask=deep_q < packed_k - k, other=0)
        if WIDEN:
            x = x.to(tl.float32)
        w = q.to(x.dtype)  # exact: eight bits fit every significand
        if x_ptr.dtype.element_ty == tl.float32:
            w -= zero[None, :, None]
        acc = tl.dot(w, x, acc, input_precision="ieee")
    finish(
        *(tl.sum(acc, axis=0), x_ptr, zero, scale, bias, bias_ptr, y_ptr),
        *(offs_m, offs_n, rows_m, M, N, K, stride_xm, BLOCK_M, BLOCK_K),
    )


LAUNCH = Launcher(_int8_linear_few)
