"""Triton: the W8A16 product of one or two rows of x, which is a question of memory alone: no matrix units, no tiles of x."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from squareq_fx.kernels.arguments import check_linear
from squareq_fx.kernels.launch import Launcher, stored_dtype
from squareq_fx.kernels.tiles import cdiv

__all__ = ["int8_gemv", "launch"]


@triton.jit
def _int8_gemv(
    x_ptr,
    q_ptr,
    scale_ptr,
    zero_ptr,
    bias_ptr,
    y_ptr,
    N,
    K,
    stride_xm,
    stride_qn,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    inside = offs_n < N
    rows = tl.where(inside, offs_n, 0)
    q_tile = q_ptr + rows.to(tl.int64)[:, None] * stride_qn + offs_k[None, :]
    zero = tl.load(zero_ptr + rows)
    scale = tl.load(scale_ptr + rows)
    first = tl.zeros((BLOCK_N, BLOCK_K), dtype=tl.float32)
    second = tl.zeros((BLOCK_N, BLOCK_K), dtype=tl.float32)
    first_sum = tl.zeros((BLOCK_K,), dtype=tl.float32)
    second_sum = tl.zeros((BLOCK_K,), dtype=tl.float32)
    for k in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        if EVEN_K:
            q = tl.load(q_tile + k).to(tl.float32)
            x = tl.load(x_ptr + k + offs_k).to(tl.float32)
        else:
            q = tl.load(q_tile + k, mask=(offs_k < K - k)[None, :], other=0).to(tl.float32)
            x = tl.load(x_ptr + k + offs_k, mask=offs_k < K - k, other=0.0).to(tl.float32)
        if x_ptr.dtype.element_ty == tl.float32:  # in 16 bits the result's rounding hides what the other order loses
            q -= zero[:, None]
        first += q * x[None, :]
        first_sum += x
        if ROWS == 2:
            x = tl.load(x_ptr + stride_xm + k + offs_k, mask=offs_k < K - k, other=0.0).to(tl.float32)
            second += q * x[None, :]
            second_sum += x
    y = tl.sum(first, axis=1)
    if x_ptr.dtype.element_ty != tl.float32:
        y -= zero * tl.sum(first_sum, axis=0)
    y *= scale
    if bias_ptr is not None:
        y += tl.load(bias_ptr + rows)
    tl.store(y_ptr + offs_n, y.to(y_ptr.dtype.element_ty), mask=inside)
    if ROWS == 2:
        y = tl.sum(second, axis=1)
        if x_ptr.dtype.element_ty != tl.float32:
            y -= zero * tl.sum(second_sum, axis=0)
        y *= scale
        if bias_ptr is not None:
            y += tl.load(bias_ptr + rows)
        tl.store(y_ptr + N + offs_n, y.to(y_ptr.dtype.element_ty), mask=inside)


_LAUNCH = Launcher(_int8_gemv)
_TILES = {1: (4, 512, 2, 3), 2: (16, 256, 4, 4)}
"""Rows of x: weight rows and columns of one step, warps, stages; the best of fourteen on an H200."""


def int8_gemv(
    x: torch.Tensor,
    qweight: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """(x @ q^T - zero_point * rowsum(x)) * scale + bias in float32, rounded once to x's dtype, for one or two rows.

    Args:
        x: [..., in] bf16, fp16 or fp32 with one row or two; qweight: [out, K' >= in] int8; scale, zero_point:
            [out] float32; bias: [out] float32 or None.
    Returns:
        [..., out] in x's dtype, a function of the inputs alone, bit for bit.
    Raises:
        TypeError, ValueError: an argument's dtype, shape or device is wrong, naming it; or x has more rows.
    """
    check_linear(x, qweight, scale, zero_point, bias)
    if x.shape[:-1].numel() > max(_TILES):
        raise ValueError(f"x has {x.shape[:-1].numel()} rows, int8_gemv takes at most {max(_TILES)}; use int8_linear")
    return launch(x, qweight, scale, zero_point, bias)


def launch(
    x: torch.Tensor,
    qweight: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """`int8_gemv` of arguments that were checked already."""
    _LAUNCH.check(x)
    in_features, width, rows = x.shape[-1], qweight.shape[0], x.shape[:-1].numel()
    y = torch.empty((*x.shape[:-1], width), dtype=stored_dtype(x.dtype, _LAUNCH.interpreted), device=x.device)
    if y.numel() == 0:
        return y.to(x.dtype)
    x2 = x.reshape(rows, in_features)
    if x2.stride(1) != 1:
        x2 = x2.contiguous()
    if qweight.stride(1) != 1:
        qweight = qweight.contiguous()
    block_n, block_k, warps, stages = _TILES[rows]
    _LAUNCH(
        cdiv(width, block_n),
        (x2, qweight, scale.contiguous(), zero_point.contiguous(), None if bias is None else bias.contiguous(), y),
        (),
        (width, in_features, x2.stride(0), qweight.stride(0)),
        (rows, block_n, block_k, in_features % block_k == 0, stages),
        num_warps=warps,
    )
    return y.to(x.dtype)
