"""Triton: what the int8 products have in common, in Gluon too: the order of their tiles and what their epilogues do."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["activated", "origin", "places"]


@triton.jit
def activated(y, ACTIVATION: tl.constexpr):
    """One of `arguments.ACTIVATIONS`, element by element."""
    if ACTIVATION == "gelu":
        y = 0.5 * y * (1.0 + tl.math.erf(y * 0.7071067811865476))
    if ACTIVATION == "gelu_tanh":
        y = y * tl.sigmoid(1.5957691216057308 * (y + 0.044715 * y * y * y))
    if ACTIVATION == "silu":
        y = y * tl.sigmoid(y)
    return y


@triton.jit
def origin(tile, M, N, group, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """First row and column of a tile, by its number."""
    # Tiles go by bands of |group| blocks, through a band crosswise: what runs at once shares operands while they are in L2.
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    of_rows = group > 0
    along = tl.where(of_rows, tiles_m, tiles_n)
    band = tl.abs(group) * tl.where(of_rows, tiles_n, tiles_m)
    first = tile // band * tl.abs(group)
    height = tl.minimum(along - first, tl.abs(group))
    i = first + tile % band % height
    j = tile % band // height
    return tl.where(of_rows, i, j) * BLOCK_M, tl.where(of_rows, j, i) * BLOCK_N


@triton.jit
def places(y_ptr, offs_m, offs_n, n0, M, part_n, ALIGNED: tl.constexpr):
    """Where results go: y is [parts, M, part_n]. n0 is the first column of a tile."""
    if ALIGNED:  # the tile's columns belong to one part
        part = n0 // part_n
        start = y_ptr + part.to(tl.int64) * M * part_n - part * part_n
        target = start + offs_m.to(tl.int64)[:, None] * part_n + offs_n[None, :]
    else:
        part = offs_n // part_n
        columns = part.to(tl.int64) * M * part_n + offs_n % part_n
        target = y_ptr + offs_m.to(tl.int64)[:, None] * part_n + columns[None, :]
    return target
