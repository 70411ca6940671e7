"""Triton: rows of activations to int8 and one scale each, in one pass over memory."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from squareq_fx.kernels.arguments import check_quantize_rows
from squareq_fx.kernels.launch import Launcher
from squareq_fx.kernels.reference import SMALLEST_ROW
from squareq_fx.kernels.tiles import cdiv

__all__ = ["WIDEST", "RowTile", "launch", "quantize_rows", "tile_for"]

WIDEST = 16384
"""Columns that one program holds in registers; a wider row is read twice."""

_WIDE_BLOCK = 4096


@triton.jit
def _rounded(x, inverse):
    # Adding 1.5 * 2^23 rounds to the nearest even integer n and leaves 0x4B400000 + n as bits, of which the lowest byte is n:
    # that spares a conversion. No element is larger than the one its row's step was made from: that spares a clamp. The launch
    # turns contraction off: fused into one step, product and sum would round otherwise than the definition.
    return (x.to(tl.float32) * inverse + 12582912.0).to(tl.int32, bitcast=True)


@triton.jit
def _magnitude(x):
    # As integers, magnitudes compare as they do as floats, and NaN is the largest: a maximum of floats would drop it.
    return x.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _step(magnitude, SMALLEST: tl.constexpr):
    top = magnitude.to(tl.float32, bitcast=True)
    return tl.where(top < SMALLEST, 1.0, tl.math.div_rn(top, 127.0))


@triton.jit(do_not_specialize=["M"])
def _quantize_rows(
    x_ptr,
    beside_ptr,
    q_ptr,
    s_ptr,
    M,
    K,
    stride_xm,
    stride_bm,
    SMALLEST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCKS: tl.constexpr,
    FIRST: tl.constexpr,  # blocks of x; the others are beside's
    EXCESS: tl.constexpr,  # of the bits of a row's rounded elements over their values, modulo 2^32
):
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.arange(0, BLOCK_K)[None, :]
    wide = rows.to(tl.int64)[:, None]
    blocks = ()
    for i in tl.static_range(BLOCKS):  # all of them are on their way before the first is looked at
        inside = (rows < M)[:, None] & (i * BLOCK_K + cols < K)
        if i < FIRST:
            at = x_ptr + wide * stride_xm + (i * BLOCK_K + cols)
        else:
            at = beside_ptr + wide * stride_bm + ((i - FIRST) * BLOCK_K + cols)
        x = tl.load(at, mask=inside, other=0.0, eviction_policy="evict_first")
        blocks = blocks + (x,)  # type: ignore[assignment]  # noqa: RUF005 - Triton knows no stars
    top = _magnitude(blocks[0])  # type: ignore[misc]
    for i in tl.static_range(1, BLOCKS):
        top = tl.maximum(top, _magnitude(blocks[i]))
    step = _step(tl.max(top, axis=1), SMALLEST)
    inverse = tl.math.div_rn(1.0, step)[:, None]
    total = tl.zeros((BLOCK_M, BLOCK_K), dtype=tl.int32)
    for i in tl.static_range(BLOCKS):
        bits = _rounded(blocks[i], inverse)
        total += bits
        inside = (rows < M)[:, None] & (i * BLOCK_K + cols < K)
        tl.store(q_ptr + wide * K + (i * BLOCK_K + cols), bits.to(tl.int8), mask=inside)
    tl.store(s_ptr + 2 * rows, step, mask=rows < M)
    tl.store(s_ptr + 2 * rows + 1, (tl.sum(total, axis=1) - EXCESS).to(tl.float32), mask=rows < M)


@triton.jit(do_not_specialize=["M"])
def _quantize_wide_rows(
    x_ptr, q_ptr, s_ptr, M, K, stride_xm, SMALLEST: tl.constexpr, BLOCK_K: tl.constexpr, EXCESS: tl.constexpr
):
    # One row, as a matrix: a sum that leaves no axis does not wrap in Triton 3.8's interpreter.
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK_K)[None, :]
    top = tl.zeros((1, BLOCK_K), dtype=tl.int32)
    for k in range(0, K, BLOCK_K):
        x = tl.load(x_ptr + row * stride_xm + k + cols, mask=cols < K - k, other=0.0)
        top = tl.maximum(top, _magnitude(x))
    step = _step(tl.max(top, axis=1), SMALLEST)
    inverse = tl.math.div_rn(1.0, step)[:, None]
    total = tl.zeros((1, BLOCK_K), dtype=tl.int32)
    for k in range(0, K, BLOCK_K):
        x = tl.load(x_ptr + row * stride_xm + k + cols, mask=cols < K - k, other=0.0)
        bits = _rounded(x, inverse)
        total += bits
        tl.store(q_ptr + row * K + k + cols, bits.to(tl.int8), mask=cols < K - k)
    at = s_ptr + 2 * row + tl.arange(0, 1)
    tl.store(at, step)
    tl.store(at + 1, (tl.sum(total, axis=1) - EXCESS).to(tl.float32))


_LAUNCH = Launcher(_quantize_rows)
_LAUNCH_WIDE = Launcher(_quantize_wide_rows)


class RowTile(NamedTuple):
    """What one program of `_quantize_rows` has: whole rows, in blocks of a power of two of columns, and warps."""

    rows: int
    columns: int
    blocks: int
    warps: int


@functools.cache
def tile_for(columns: int, first: int | None = None) -> RowTile | None:
    """The tile for rows of so many columns: blocks that leave few lanes idle, and few warps, each with much on its way.

    A lane reads eight columns at a time, and keeps at most 128.

    Args:
        first: how many of the columns are x's, which must be whole blocks; None if all are.
    Returns:
        None if no tile has such blocks.
    """
    if columns > WIDEST:
        return None
    width = max(16, triton.next_power_of_2(columns))
    narrower = [size for size in (1024, 512, 256, 128) if width > size >= columns / 16]
    if first is not None:
        narrower = [size for size in narrower if first % size == 0]
        if not narrower:
            return None
        width = narrower[0]
    best = min((width if width <= 4096 else 4096, *narrower), key=lambda size: (-(-columns // size) * size, -size))
    held = -(-columns // best) * best
    warps = 1 if held <= 4096 else 2 if held <= 8192 else 4
    return RowTile(max(1, 256 // best, 512 // held), best, held // best, warps)


def _excess(elements: int) -> int:
    """The sum of so many 0x4B400000, as the int32 it wraps to."""
    return (elements * 0x4B400000 + 2**31) % 2**32 - 2**31


def quantize_rows(x: torch.Tensor, beside: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """reference.quantize_rows bit for bit.

    Args:
        x: [..., K] bf16, fp16 or fp32, any strides.
        beside: [..., L] of the same dtype, any strides, or None.
    Returns:
        xq int8 [..., K + L], contiguous; sx float32 [..., 2], step and sum of each row.
    Raises:
        TypeError, ValueError: x has another dtype, no dimension, or is not on a CUDA device; beside does not fit it.
    """
    check_quantize_rows(x, beside)
    return launch(x, beside)


def launch(
    x: torch.Tensor, beside: torch.Tensor | None = None, tile: RowTile | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """`quantize_rows` of arguments that were checked already; tile: another than `tile_for` has, for measuring."""
    _LAUNCH.check(x)
    columns, rows = x.shape[-1] + (0 if beside is None else beside.shape[-1]), x.shape[:-1].numel()
    q = torch.empty((*x.shape[:-1], columns), dtype=torch.int8, device=x.device)
    scale = torch.empty((*x.shape[:-1], 2), dtype=torch.float32, device=x.device)
    if q.numel() == 0:
        scale[..., 0], scale[..., 1] = 1.0, 0.0
        return q, scale
    tile = tile or tile_for(columns, None if beside is None else x.shape[-1])
    if beside is not None and tile is None:  # no block may hold columns of both
        return launch(torch.cat((x, beside), dim=-1))
    x2 = _as_rows(x, rows)
    other = x2 if beside is None else _as_rows(beside, rows)
    if tile is None:
        excess = _excess(cdiv(columns, _WIDE_BLOCK) * _WIDE_BLOCK)
        constants: tuple[Any, ...] = (SMALLEST_ROW, _WIDE_BLOCK, excess)
        _LAUNCH_WIDE(
            rows, (x2, q, scale), (rows,), (columns, x2.stride(0)), constants, num_warps=8, enable_fp_fusion=False
        )  # fmt: skip
    else:
        height, width, blocks, warps = tile
        first = blocks if beside is None else x.shape[-1] // width
        constants = (SMALLEST_ROW, height, width, blocks, first, _excess(width * blocks))
        _LAUNCH(
            cdiv(rows, height), (x2, other, q, scale), (rows,), (columns, x2.stride(0), other.stride(0)), constants,
            num_warps=warps, enable_fp_fusion=False,
        )  # fmt: skip
    return q, scale


def _as_rows(x: torch.Tensor, rows: int) -> torch.Tensor:
    flat = x.reshape(rows, x.shape[-1])
    return flat if flat.stride(1) == 1 else flat.contiguous()
