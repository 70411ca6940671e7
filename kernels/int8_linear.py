"""Triton: the fused W8A16 product. int8 weights meet 16-bit (or float32) activations in the matrix units;
scale, zero point and bias are applied to the float32 accumulator, so a float weight never exists in memory.

The product is computed transposed, (weight tile) @ (activation tile)^T: the operand that must be widened from
int8 is then the left one, which Hopper's matrix units take from registers, and few tokens need few columns.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from squareq_fx.kernels import int8_linear_few
from squareq_fx.kernels.arguments import check_linear
from squareq_fx.kernels.counters import COUNTERS, counters
from squareq_fx.kernels.int8_linear_parts import finish, of_columns
from squareq_fx.kernels.launch import Launcher, stored_dtype
from squareq_fx.kernels.tiles import FusedTile, cdiv, tile_for

__all__ = ["int8_linear", "launch"]


@triton.jit(do_not_specialize=["M", "split"])
def _int8_linear(
    x_ptr,
    q_ptr,
    scale_ptr,
    zero_ptr,
    bias_ptr,
    y_ptr,
    partial_ptr,
    counter_ptr,
    M,
    split,
    N,
    K,
    packed_k,
    stride_xm,
    stride_qn,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    WIDEN: tl.constexpr,
    SPLITS: tl.constexpr,
):
    # Tiles of up to eight row blocks share their weight tile while it is in L2.
    pid = tl.program_id(0)
    begin, end = 0, K
    if SPLITS:
        piece = pid % split
        pid = pid // split
        depth = tl.cdiv(K, BLOCK_K)
        begin = depth * piece // split * BLOCK_K
        end = tl.minimum(depth * (piece + 1) // split * BLOCK_K, K)
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    first_m = (pid // (8 * tiles_n)) * 8
    height = tl.minimum(tiles_m - first_m, 8)
    pid_m = first_m + (pid % (8 * tiles_n)) % height
    pid_n = (pid % (8 * tiles_n)) // height

    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    # A weight row past the end reads row 0 and is not stored, which keeps its mask out of the loop. A row of x past the end is
    # not read at all: every program reads all of x, so sixteen rows for four would be four times the bytes from L2.
    inside_m = (offs_m < M)[None, :]
    rows_m = tl.where(offs_m < M, offs_m, 0).to(tl.int64)
    rows_n = tl.where(offs_n < N, offs_n, 0).to(tl.int64)
    x_tile = x_ptr + rows_m[None, :] * stride_xm + offs_k[:, None]
    q_tile = q_ptr + rows_n[:, None] * stride_qn + offs_k[None, :]
    zero, scale, bias = of_columns(zero_ptr, scale_ptr, bias_ptr, rows_n)

    acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    for k in range(begin, end, BLOCK_K):
        if EVEN_K:
            x = tl.load(x_tile + k, mask=inside_m, other=0.0)
            q = tl.load(q_tile + k)
        else:
            x = tl.load(x_tile + k, mask=inside_m & (offs_k[:, None] < K - k), other=0.0)
            q = tl.load(q_tile + k, mask=offs_k[None, :] < packed_k - k, other=0)
        if WIDEN:
            x = x.to(tl.float32)
        w = q.to(x.dtype)  # exact: eight bits fit every significand
        if x_ptr.dtype.element_ty == tl.float32:
            w -= zero[:, None]
        acc = tl.dot(w, x, acc, input_precision="ieee")

    last = pid >= 0
    if SPLITS:
        # Each piece leaves its sums and counts itself; whoever counts last adds them all up, in the order of the pieces.
        inner = tl.arange(0, BLOCK_N)[:, None] * BLOCK_M + tl.arange(0, BLOCK_M)[None, :]
        slots = partial_ptr + pid.to(tl.int64) * split * (BLOCK_M * BLOCK_N)
        tl.store(slots + piece * (BLOCK_M * BLOCK_N) + inner, acc, cache_modifier=".cg")
        tl.debug_barrier()
        done = tl.atomic_add(counter_ptr + pid, 1, sem="acq_rel", scope="gpu")
        last = done == split - 1
        if last:
            tl.debug_barrier()
            acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
            for first in range(0, split, 4):
                for i in tl.static_range(4):  # four at a time are on their way
                    other = tl.zeros_like(inner) + (first + i)
                    sums = slots + other * (BLOCK_M * BLOCK_N) + inner
                    acc += tl.load(sums, mask=other < split, other=0.0, cache_modifier=".cg")
            tl.store(counter_ptr + pid, 0)  # ready for the next launch
    if last:
        finish(
            *(acc, x_ptr, zero, scale, bias, bias_ptr, y_ptr),
            *(offs_m, offs_n, rows_m, M, N, K, stride_xm, BLOCK_M, BLOCK_K),
        )


_LAUNCH = Launcher(_int8_linear)
_INTERPRETER_TILE = FusedTile(16, 32, 64, 4, 1, 2)
"""Small, so that a test of a few dozen rows and columns has several tiles, split ones, and a ragged last one."""


def int8_linear(
    x: torch.Tensor,
    qweight: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor,
    bias: torch.Tensor | None = None,
    tile: FusedTile | None = None,
) -> torch.Tensor:
    """(x @ q^T - zero_point * rowsum(x)) * scale + bias in float32, rounded once to x's dtype.

    Args:
        x: [..., in] bf16, fp16 or fp32, any strides; qweight: [out, K' >= in] int8; scale, zero_point: [out]
            float32; bias: [out] float32 or None.
        tile: fixes the tile; by default the one `tiles` has for (rows, out, in).
    Returns:
        [..., out] in x's dtype. Sums are taken in a fixed order: for one tile a function of the inputs alone, bit for bit.
    Raises:
        TypeError, ValueError: an argument's dtype, shape or device is wrong, naming it.
    """
    check_linear(x, qweight, scale, zero_point, bias)
    return launch(x, qweight, scale, zero_point, bias, tile)


def launch(
    x: torch.Tensor,
    qweight: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor,
    bias: torch.Tensor | None,
    tile: FusedTile | None = None,
) -> torch.Tensor:
    """`int8_linear` of arguments that were checked already."""
    _LAUNCH.check(x)
    in_features, out_features = x.shape[-1], qweight.shape[0]
    rows = x.shape[:-1].numel()
    y = torch.empty((*x.shape[:-1], out_features), dtype=stored_dtype(x.dtype, _LAUNCH.interpreted), device=x.device)
    if y.numel() == 0:
        return y.to(x.dtype)
    x2 = x.reshape(rows, in_features)
    if x2.stride(1) != 1:
        x2 = x2.contiguous()
    if qweight.stride(1) != 1:
        qweight = qweight.contiguous()
    if tile is None:
        known = tile_for("int8_linear", rows, out_features, in_features, x.dtype, x.device) if not _LAUNCH.interpreted else None
        tile = known if isinstance(known, FusedTile) else _INTERPRETER_TILE
    tiles = cdiv(rows, tile.m) * cdiv(out_features, tile.n)
    pointers = (x2, qweight, scale.contiguous(), zero_point.contiguous(), None if bias is None else bias.contiguous(), y)
    sizes = (out_features, in_features, qweight.shape[1], x2.stride(0), qweight.stride(0))
    widen = y.dtype != x.dtype  # the interpreter multiplies bfloat16 as integers
    even = in_features % tile.step == 0
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    if tile.pieces > 1:
        constants = (tile.m, tile.n, tile.k, tile.pieces, even, widen)
        int8_linear_few.LAUNCH(tiles, pointers, (rows,), sizes, constants, **options)
        return y.to(x.dtype)
    split, partial, count = min(tile.split, max(1, cdiv(in_features, tile.k))), None, None
    if split > 1:
        count = counters(x.device) if tiles <= COUNTERS else None
        split = split if count is not None else 1
    if split > 1:
        partial = torch.empty(tiles * split * tile.m * tile.n, dtype=torch.float32, device=x.device)
    constants = (tile.m, tile.n, tile.k, even, widen, split > 1)
    _LAUNCH(tiles * split, (*pointers, partial, count), (rows, split), sizes, constants, **options)
    return y.to(x.dtype)
