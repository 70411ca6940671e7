"""Triton: int8 activations times int8 weights on the int8 matrix units, finished in the same kernel.

Sums are int32 and so exact: in which order they are taken cannot be seen in the result. That is why the last tiles, which do
not fill the card, can be cut along K and summed by whichever program comes last (Stream-K, arXiv 2301.03598, with a tail of
split tiles only) without losing the same bits at every run. Or they are cut into halves of their rows, if all run at once.

On Hopper, programs stay and take tile after tile, and the tensor copy engine fetches the operands, so that one tile's first
bytes arrive while another is finished. Large products go to `int8_matmul_hopper` there.
"""

from __future__ import annotations

import functools
from importlib import import_module
from types import ModuleType
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from squareq_fx.kernels.arguments import check_matmul
from squareq_fx.kernels.counters import COUNTERS, counters
from squareq_fx.kernels.int8_matmul_parts import activated, origin, places
from squareq_fx.kernels.launch import Launcher, stored_dtype
from squareq_fx.kernels.tiles import MatmulTile, Tail, cdiv, halves_fit, processors, tile_for

__all__ = ["Schedule", "int8_matmul", "launch"]


@triton.jit
def _finish(
    acc,
    m0,
    n0,
    sx_ptr,
    scale_ptr,
    zero_ptr,
    bias_ptr,
    addend_ptr,
    y_ptr,
    M,
    N,
    stride_am,
    part_n,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ALIGNED: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    offs_m = m0 + tl.arange(0, BLOCK_M)
    offs_n = n0 + tl.arange(0, BLOCK_N)
    rows_m = tl.where(offs_m < M, offs_m, 0)
    rows_n = tl.where(offs_n < N, offs_n, 0)
    step = tl.load(sx_ptr + 2 * rows_m)
    total = tl.load(sx_ptr + 2 * rows_m + 1)
    scale = tl.load(scale_ptr + rows_n)
    zero = tl.load(zero_ptr + rows_n)
    y = (acc.to(tl.float32) - total[:, None] * zero[None, :]) * (step[:, None] * scale[None, :])
    if bias_ptr is not None:
        y += tl.load(bias_ptr + rows_n)[None, :]
    y = activated(y, ACTIVATION)
    inside = (offs_m < M)[:, None] & (offs_n < N)[None, :]
    if addend_ptr is not None:
        extra = tl.load(addend_ptr + rows_m.to(tl.int64)[:, None] * stride_am + offs_n[None, :], mask=inside, other=0.0)
        y += extra.to(tl.float32)
    tl.store(places(y_ptr, offs_m, offs_n, n0, M, part_n, ALIGNED), y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _product(
    acc,
    a,
    b,
    m0,
    n0,
    begin,
    end,
    M,
    N,
    K,
    packed_k,
    stride_xm,
    stride_qn,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    EVEN_K: tl.constexpr,
):
    if DESCRIPTORS:
        for i in range(begin, end):
            x = a.load([m0, i * BLOCK_K])
            w = b.load([n0, i * BLOCK_K])
            acc = tl.dot(x, w.T, acc, out_dtype=tl.int32)
    else:
        # A row past the end reads row 0 and is not stored, which keeps row masks out of the loop.
        offs_m = m0 + tl.arange(0, BLOCK_M)
        offs_n = n0 + tl.arange(0, BLOCK_N)
        offs_k = tl.arange(0, BLOCK_K)
        x_tile = a + tl.where(offs_m < M, offs_m, 0).to(tl.int64)[:, None] * stride_xm + offs_k[None, :]
        w_tile = b + tl.where(offs_n < N, offs_n, 0).to(tl.int64)[None, :] * stride_qn + offs_k[:, None]
        for i in range(begin, end):
            k = i * BLOCK_K
            if EVEN_K:
                x = tl.load(x_tile + k)
                w = tl.load(w_tile + k)
            else:
                x = tl.load(x_tile + k, mask=offs_k[None, :] < K - k, other=0)
                w = tl.load(w_tile + k, mask=offs_k[:, None] < packed_k - k, other=0)
            acc = tl.dot(x, w, acc, out_dtype=tl.int32)
    return acc


@triton.jit(do_not_specialize=["M", "whole", "tail", "split", "group"])
def _int8_matmul(
    a,  # [M, K] int8: a tensor descriptor if DESCRIPTORS, else a pointer
    b,  # [N, K'] likewise
    half,  # of a again, half as many rows at a time; None if there are no halves or no descriptors
    sx_ptr,
    scale_ptr,
    zero_ptr,
    bias_ptr,
    addend_ptr,
    y_ptr,
    partial_ptr,
    counter_ptr,
    M,
    whole,  # tiles computed by one program each
    tail,  # tiles after those
    split,  # programs that share each tile of the tail: its depth, or two its rows
    group,  # MatmulTile.group
    N,
    K,
    packed_k,
    stride_xm,
    stride_qn,
    stride_am,
    part_n,  # columns of one part of y
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    EVEN_K: tl.constexpr,
    ALIGNED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    TAIL: tl.constexpr,
):
    pid = tl.program_id(0)
    depth = tl.cdiv(K, BLOCK_K)
    for tile in tl.range(pid, whole, tl.num_programs(0), flatten=True):
        m0, n0 = origin(tile, M, N, group, BLOCK_M, BLOCK_N)
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32)
        if DESCRIPTORS:  # written out: only a loop right inside this one is flattened into it
            for i in range(depth):
                x = a.load([m0, i * BLOCK_K])
                w = b.load([n0, i * BLOCK_K])
                acc = tl.dot(x, w.T, acc, out_dtype=tl.int32)
        else:
            acc = _product(
                acc, a, b, m0, n0, 0, depth, M, N, K, packed_k, stride_xm, stride_qn,
                BLOCK_M, BLOCK_N, BLOCK_K, DESCRIPTORS, EVEN_K,
            )  # fmt: skip
        _finish(
            acc, m0, n0, sx_ptr, scale_ptr, zero_ptr, bias_ptr, addend_ptr, y_ptr, M, N, stride_am, part_n,
            BLOCK_M, BLOCK_N, ALIGNED, ACTIVATION,
        )  # fmt: skip

    if TAIL == "ROWS" and pid < tail * split:
        HALF: tl.constexpr = BLOCK_M // 2
        m0, n0 = origin(whole + pid // 2, M, N, group, BLOCK_M, BLOCK_N)
        m0 += pid % 2 * HALF
        acc = _product(
            tl.zeros((HALF, BLOCK_N), dtype=tl.int32), half if DESCRIPTORS else a, b, m0, n0, 0, depth,
            M, N, K, packed_k, stride_xm, stride_qn, HALF, BLOCK_N, BLOCK_K, DESCRIPTORS, EVEN_K,
        )  # fmt: skip
        _finish(
            acc, m0, n0, sx_ptr, scale_ptr, zero_ptr, bias_ptr, addend_ptr, y_ptr, M, N, stride_am, part_n,
            HALF, BLOCK_N, ALIGNED, ACTIVATION,
        )  # fmt: skip
    if TAIL == "DEPTH" and pid < tail * split:
        tile = whole + pid // split
        piece = pid % split
        m0, n0 = origin(tile, M, N, group, BLOCK_M, BLOCK_N)
        acc = _product(
            tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32), a, b, m0, n0, depth * piece // split, depth * (piece + 1) // split,
            M, N, K, packed_k, stride_xm, stride_qn, BLOCK_M, BLOCK_N, BLOCK_K, DESCRIPTORS, EVEN_K,
        )  # fmt: skip
        # Each piece leaves its sums and counts itself; whoever counts last adds the others' to its own.
        slot = partial_ptr + (pid // split).to(tl.int64) * split * (BLOCK_M * BLOCK_N)
        inner = tl.arange(0, BLOCK_M)[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
        tl.store(slot + piece * (BLOCK_M * BLOCK_N) + inner, acc, cache_modifier=".cg")
        tl.debug_barrier()
        done = tl.atomic_add(counter_ptr + pid // split, 1, sem="acq_rel", scope="gpu")
        if done == split - 1:
            tl.debug_barrier()
            for other in range(split):
                if other != piece:
                    acc += tl.load(slot + other * (BLOCK_M * BLOCK_N) + inner, cache_modifier=".cg")
            tl.store(counter_ptr + pid // split, 0)  # ready for the next launch
            _finish(
                acc, m0, n0, sx_ptr, scale_ptr, zero_ptr, bias_ptr, addend_ptr, y_ptr, M, N, stride_am, part_n,
                BLOCK_M, BLOCK_N, ALIGNED, ACTIVATION,
            )  # fmt: skip


_LAUNCH = Launcher(_int8_matmul)
_INTERPRETER_TILE = MatmulTile(16, 32, 64, 4, 1, 1, Tail.DEPTH)
_WITHOUT_DESCRIPTORS = MatmulTile(128, 128, 128, 4, 3, 2, Tail.WHOLE)
"""Instead of a tile that needs the tensor copy engine, for operands it does not take."""
_INTERPRETER_PROGRAMS = 4
"""The interpreter's card: so few programs at a time that small tests split tiles too."""
_MIN_DEPTH = 2 if _LAUNCH.interpreted else 8
"""Steps of K that a piece of a split tile has at least: leaving and adding sums costs about as much as five."""


def int8_matmul(
    xq: torch.Tensor,
    sx: torch.Tensor,
    qweight: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
    activation: str = "none",
    addend: torch.Tensor | None = None,
    parts: int = 1,
    tile: MatmulTile | None = None,
) -> torch.Tensor:
    """reference.int8_matmul; arguments, result and errors are its.

    Args:
        tile: fixes the tile, which changes the time only; by default the one `tiles` has for (rows, width, depth).
    """
    check_matmul(xq, sx, qweight, scale, zero_point, bias, dtype, activation, addend, parts)
    return launch(xq, sx, qweight, scale, zero_point, bias, dtype, activation, addend, parts, tile)


def launch(
    xq: torch.Tensor,
    sx: torch.Tensor,
    qweight: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
    activation: str = "none",
    addend: torch.Tensor | None = None,
    parts: int = 1,
    tile: MatmulTile | None = None,
) -> torch.Tensor:
    """`int8_matmul` of arguments that were checked already."""
    _LAUNCH.check(xq)
    in_features, rows, width = xq.shape[-1], xq.shape[:-1].numel(), qweight.shape[0]
    shape = (*xq.shape[:-1], width // parts)
    y = torch.empty(shape if parts == 1 else (parts, *shape), dtype=stored_dtype(dtype, _LAUNCH.interpreted), device=xq.device)
    if y.numel() == 0:
        return y.to(dtype)
    x2 = _rows(xq, rows, in_features)
    extra = None if addend is None else _rows(addend, rows, width)
    if qweight.stride(1) != 1:
        qweight = qweight.contiguous()
    if tile is None:
        known = tile_for("int8_matmul", rows, width, in_features, dtype, xq.device) if not _LAUNCH.interpreted else None
        tile = known if isinstance(known, MatmulTile) else _INTERPRETER_TILE
    described = not _LAUNCH.interpreted and _has_descriptors(xq.device) and _is_described(x2) and _is_described(qweight)
    if tile.fetching and not described:
        tile = _WITHOUT_DESCRIPTORS
    plan = _schedule(rows, width, in_features, tile, xq.device)
    partial = count = None
    if plan.kind == Tail.DEPTH:
        count = counters(xq.device)
        if count is None:
            plan = Schedule(plan.whole + plan.tail, 0, 1, plan.programs, Tail.WHOLE)
        else:
            partial = torch.empty(plan.tail * plan.split * tile.m * tile.n, dtype=torch.int32, device=xq.device)
    a: object = x2
    b: object = qweight
    half: object = None
    if described:
        describe = _hopper().described if tile.fetching else _described
        a = describe(x2, tile.m, tile.k)
        if plan.kind == Tail.ROWS:
            half = describe(x2, tile.m // 2, tile.k)
        b = describe(qweight[:, :in_features], tile.n, tile.k)
    vectors = sx.contiguous(), scale.contiguous(), zero_point.contiguous(), None if bias is None else bias.contiguous()
    stride, columns = 0 if extra is None else extra.stride(0), width // parts
    aligned = parts == 1 or columns % tile.n == 0
    if tile.fetching:
        _hopper().LAUNCH(
            plan.programs,
            (a, b, half, *vectors, extra, y),
            (rows, plan.whole, plan.tail, tile.group),
            (width, in_features, stride, columns),
            (tile.m, tile.n, tile.k, tile.stages, aligned, activation, plan.kind.name),
            num_warps=tile.warps,
        )
    else:
        _LAUNCH(
            plan.programs,
            (a, b, half, *vectors, extra, y, partial, count),
            (rows, plan.whole, plan.tail, plan.split, tile.group),
            (width, in_features, qweight.shape[1], x2.stride(0), qweight.stride(0), stride, columns),
            (tile.m, tile.n, tile.k, described, in_features % tile.k == 0, aligned, activation, plan.kind.name),
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
    return y.to(dtype)


@functools.cache
def _hopper() -> ModuleType:
    return import_module("squareq_fx.kernels.int8_matmul_hopper")  # late: cards and Tritons that have no use for it


def _described(matrix: torch.Tensor, rows: int, depth: int) -> TensorDescriptor:
    return TensorDescriptor(matrix, list(matrix.shape), [matrix.stride(0), 1], [rows, depth])


def _rows(x: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    flat = x.reshape(rows, columns)
    return flat if flat.stride(1) == 1 else flat.contiguous()


class Schedule(NamedTuple):
    """Tiles of one program each, tiles after those, programs for each of these, programs launched, how the tail is cut."""

    whole: int
    tail: int
    split: int
    programs: int
    kind: Tail


@functools.lru_cache(maxsize=4096)
def _schedule(rows: int, width: int, depth: int, tile: MatmulTile, device: torch.device) -> Schedule:
    tiles = cdiv(rows, tile.m) * cdiv(width, tile.n)
    if not tile.programs:
        return Schedule(tiles, 0, 1, tiles, Tail.WHOLE)
    at_once = _INTERPRETER_PROGRAMS if _LAUNCH.interpreted else processors(device) * tile.programs
    tail, split = tiles % at_once, 1
    if tile.tail == Tail.ROWS and halves_fit(tail, at_once):
        split = 2
    if tile.tail == Tail.DEPTH and 0 < tail <= COUNTERS:
        split = min(at_once // tail, cdiv(depth, tile.k) // _MIN_DEPTH)
    if split < 2:
        return Schedule(tiles, 0, 1, min(tiles, at_once), Tail.WHOLE)
    return Schedule(tiles - tail, tail, split, max(min(tiles - tail, at_once), tail * split), tile.tail)


@functools.cache
def _has_descriptors(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= (9, 0)


def _is_described(matrix: torch.Tensor) -> bool:
    """Whether the tensor copy engine takes the matrix: 16-byte addresses and rows, which do not overlap."""
    return matrix.data_ptr() % 16 == 0 and matrix.stride(0) % 16 == 0 and matrix.stride(0) >= matrix.shape[1]
