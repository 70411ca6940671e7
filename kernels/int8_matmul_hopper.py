"""Gluon, for Hopper: the int8 product with warps of its own that fetch, and two groups of warps that multiply.

A multiprocessor holds one program and the program one tile, of 256 rows where there are enough of them, twice as large as
`int8_matmul`'s: of a product's operands it asks L2 for three quarters of the bytes. One warp keeps the tensor copy engine
busy, a ring of stages ahead and across tiles; each half of a tile's rows belongs to a group of four warps that waits for a
stage, multiplies (wgmma, its sums stay in registers) and gives the stage back. The groups do not wait for each other, so one
finishes its half while the other multiplies (warp specialisation, as CUTLASS 3's cooperative kernels have it).

Triton's own language cannot say which warp does what; Gluon, which Triton ships, can. Sums are exact, so the bits are those of
`int8_matmul`.
"""

from __future__ import annotations

import functools

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from squareq_fx.kernels.int8_matmul_parts import activated, origin, places
from squareq_fx.kernels.launch import Launcher

__all__ = ["LAUNCH", "described"]

_load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared  # before Triton 3.8


@gluon.jit
def _next(slot, phase, STAGES: gl.constexpr):
    last = slot == STAGES - 1
    return gl.where(last, 0, slot + 1), gl.where(last, phase ^ 1, phase)


@gluon.jit
def _before(slot, STAGES: gl.constexpr):
    # Not a variable that is set to slot at each step: if it is slot before the loop too, Triton takes it for one that stays.
    return gl.where(slot == 0, STAGES - 1, slot - 1)


@gluon.jit
def _fetch(
    a, b, xs, ws, ready, free, m0, n0, depth, slot, phase,
    ROWS: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    for i in range(depth):
        mbarrier.wait(free.index(slot), phase ^ 1)
        full = ready.index(slot)
        mbarrier.expect(full, (ROWS + BLOCK_N) * BLOCK_K)
        _load(a, [m0, i * BLOCK_K], full, xs.index(slot).slice(0, ROWS))
        _load(b, [n0, i * BLOCK_K], full, ws.index(slot))
        slot, phase = _next(slot, phase, STAGES)
    return slot, phase


@gluon.jit
def _fetches(
    a, half, b, xs, ws, ready, free, M, whole, tail, group, N, K,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr, TAIL: gl.constexpr,
):  # fmt: skip
    """The warp that fetches; what `_products` does with it, in the same order."""
    pid = gl.program_id(0)
    depth = gl.cdiv(K, BLOCK_K)
    slot = 0
    phase = 0
    for tile in range(pid, whole, gl.num_programs(0)):
        m0, n0 = origin(tile, M, N, group, BLOCK_M, BLOCK_N)
        slot, phase = _fetch(a, b, xs, ws, ready, free, m0, n0, depth, slot, phase, BLOCK_M, BLOCK_N, BLOCK_K, STAGES)
    if TAIL == "ROWS" and pid < 2 * tail:
        m0, n0 = origin(whole + pid // 2, M, N, group, BLOCK_M, BLOCK_N)
        m0 += pid % 2 * (BLOCK_M // 2)
        _fetch(half, b, xs, ws, ready, free, m0, n0, depth, slot, phase, BLOCK_M // 2, BLOCK_N, BLOCK_K, STAGES)


@gluon.jit
def _product(
    xs, ws, ready, free, depth, slot, phase,
    ROW: gl.constexpr, ROWS: gl.constexpr, COLUMN: gl.constexpr, COLUMNS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    sums: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, 32])
    acc = gl.zeros([ROWS, COLUMNS], gl.int32, sums)
    for i in range(depth):
        mbarrier.wait(ready.index(slot), phase)
        x = xs.index(slot).slice(ROW, ROWS)
        w = ws.index(slot).slice(COLUMN, COLUMNS).permute((1, 0))
        acc = warpgroup_mma(x, w, acc, use_acc=i > 0, is_async=True)
        acc = warpgroup_mma_wait(1, deps=[acc])
        mbarrier.arrive(free.index(_before(slot, STAGES)), pred=i > 0)  # the product before this one is done with its stage
        slot, phase = _next(slot, phase, STAGES)
    acc = warpgroup_mma_wait(0, deps=[acc])
    mbarrier.arrive(free.index(_before(slot, STAGES)))
    return acc, slot, phase


@gluon.jit
def _split(x, PIECES: gl.constexpr):
    if PIECES == 1:
        return (x,)
    else:
        left, right = x.reshape([x.shape[0], 2, x.shape[1] // 2]).permute(0, 2, 1).split()
        return _split(left, PIECES // 2) + _split(right, PIECES // 2)


@gluon.jit
def _lines(m0, n0, sx_ptr, scale_ptr, zero_ptr, bias_ptr, M, N, ROWS: gl.constexpr, BLOCK_N: gl.constexpr):
    # Asked for before the product and used after it: their way from memory takes as long as some steps of it.
    line: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    offs_m = m0 + gl.arange(0, ROWS, line)
    step = gl.load(sx_ptr + 2 * offs_m, mask=offs_m < M, other=0.0)
    total = gl.load(sx_ptr + 2 * offs_m + 1, mask=offs_m < M, other=0.0)
    offs_n = n0 + gl.arange(0, BLOCK_N, line)
    scale = gl.load(scale_ptr + offs_n, mask=offs_n < N, other=0.0)
    zero = gl.load(zero_ptr + offs_n, mask=offs_n < N, other=0.0)
    bias = zero
    if bias_ptr is not None:
        bias = gl.load(bias_ptr + offs_n, mask=offs_n < N, other=0.0)
    return step, total, scale, zero, bias


@gluon.jit
def _finish(
    acc, lines, shared, FIRST: gl.constexpr, m0, n0, bias_ptr, addend_ptr, y_ptr, M, N, stride_am, part_n,
    ROWS: gl.constexpr, BLOCK_N: gl.constexpr, ALIGNED: gl.constexpr, ACTIVATION: gl.constexpr,
):  # fmt: skip
    # By pieces of columns: all columns' scales, zero points and biases would not fit the registers beside the sums.
    PIECE: gl.constexpr = 64 if addend_ptr is None else 32
    sums: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, PIECE, 32])
    stored: gl.constexpr = gl.BlockedLayout([1, 8], [256 // PIECE, PIECE // 8], [4, 1], [1, 0])
    step, total, scale, zero, bias = lines
    shared.index(FIRST + 0).slice(0, ROWS).store(step)
    shared.index(FIRST + 1).slice(0, ROWS).store(total)
    shared.index(FIRST + 2).slice(0, BLOCK_N).store(scale)
    shared.index(FIRST + 3).slice(0, BLOCK_N).store(zero)
    if bias_ptr is not None:
        shared.index(FIRST + 4).slice(0, BLOCK_N).store(bias)
    step = shared.index(FIRST + 0).slice(0, ROWS).load(gl.SliceLayout(1, sums))
    total = shared.index(FIRST + 1).slice(0, ROWS).load(gl.SliceLayout(1, sums))
    out_m = m0 + gl.arange(0, ROWS, gl.SliceLayout(1, stored))
    pieces = _split(acc, BLOCK_N // PIECE)
    for p in gl.static_range(BLOCK_N // PIECE):
        scale = shared.index(FIRST + 2).slice(p * PIECE, PIECE).load(gl.SliceLayout(0, sums))
        zero = shared.index(FIRST + 3).slice(p * PIECE, PIECE).load(gl.SliceLayout(0, sums))
        y = gl.convert_layout(pieces[p], sums)
        y = (y.to(gl.float32) - total[:, None] * zero[None, :]) * (step[:, None] * scale[None, :])
        if bias_ptr is not None:
            y += shared.index(FIRST + 4).slice(p * PIECE, PIECE).load(gl.SliceLayout(0, sums))[None, :]
        y = activated(y, ACTIVATION)
        out_n = n0 + p * PIECE + gl.arange(0, PIECE, gl.SliceLayout(0, stored))
        inside = (out_m < M)[:, None] & (out_n < N)[None, :]
        if addend_ptr is not None:
            extra = gl.load(addend_ptr + out_m.to(gl.int64)[:, None] * stride_am + out_n[None, :], mask=inside, other=0.0)
            y += gl.convert_layout(extra, sums).to(gl.float32)
        target = places(y_ptr, out_m, out_n, n0, M, part_n, ALIGNED)
        gl.store(target, gl.convert_layout(y.to(y_ptr.dtype.element_ty), stored), mask=inside)


@gluon.jit
def _products(
    GROUP: gl.constexpr, xs, ws, ready, free, shared,
    sx_ptr, scale_ptr, zero_ptr, bias_ptr, addend_ptr, y_ptr,
    M, whole, tail, group, N, K, stride_am, part_n,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr,
    ALIGNED: gl.constexpr, ACTIVATION: gl.constexpr, TAIL: gl.constexpr,
):  # fmt: skip
    """One of the two groups of warps that multiply."""
    ROWS: gl.constexpr = BLOCK_M // 2
    pid = gl.program_id(0)
    depth = gl.cdiv(K, BLOCK_K)
    slot = 0
    phase = 0
    for tile in range(pid, whole, gl.num_programs(0)):
        m0, n0 = origin(tile, M, N, group, BLOCK_M, BLOCK_N)
        m0 += GROUP * ROWS
        lines = _lines(m0, n0, sx_ptr, scale_ptr, zero_ptr, bias_ptr, M, N, ROWS, BLOCK_N)
        acc, slot, phase = _product(xs, ws, ready, free, depth, slot, phase, GROUP * ROWS, ROWS, 0, BLOCK_N, STAGES)
        _finish(
            acc, lines, shared, 8 * GROUP, m0, n0, bias_ptr, addend_ptr, y_ptr, M, N, stride_am, part_n,
            ROWS, BLOCK_N, ALIGNED, ACTIVATION,
        )  # fmt: skip
    if TAIL == "ROWS" and pid < 2 * tail:
        # The groups part its rows again, or its columns where these are as few as a product of the matrix units takes.
        HALF: gl.constexpr = max(ROWS // 2, 64)
        COLUMNS: gl.constexpr = BLOCK_N if HALF < ROWS else BLOCK_N // 2
        ROW: gl.constexpr = GROUP * HALF if HALF < ROWS else 0
        COLUMN: gl.constexpr = 0 if HALF < ROWS else GROUP * COLUMNS
        m0, n0 = origin(whole + pid // 2, M, N, group, BLOCK_M, BLOCK_N)
        m0 += pid % 2 * ROWS + ROW
        n0 += COLUMN
        lines = _lines(m0, n0, sx_ptr, scale_ptr, zero_ptr, bias_ptr, M, N, HALF, COLUMNS)
        acc, slot, phase = _product(xs, ws, ready, free, depth, slot, phase, ROW, HALF, COLUMN, COLUMNS, STAGES)
        _finish(
            acc, lines, shared, 8 * GROUP, m0, n0, bias_ptr, addend_ptr, y_ptr, M, N, stride_am, part_n,
            HALF, COLUMNS, ALIGNED, ACTIVATION,
        )  # fmt: skip


@gluon.jit(do_not_specialize=["M", "whole", "tail", "group"])
def _int8_matmul(
    a,  # [M, K] int8, described for BLOCK_M rows at a time
    b,  # [N, K'], for BLOCK_N
    half,  # a, for half as many rows; None unless TAIL is ROWS
    sx_ptr,
    scale_ptr,
    zero_ptr,
    bias_ptr,
    addend_ptr,
    y_ptr,
    M,
    whole,
    tail,
    group,
    N,
    K,
    stride_am,
    part_n,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr,
    ALIGNED: gl.constexpr,
    ACTIVATION: gl.constexpr,
    TAIL: gl.constexpr,
):
    xs = gl.allocate_shared_memory(gl.int8, [STAGES, BLOCK_M, BLOCK_K], a.layout)
    ws = gl.allocate_shared_memory(gl.int8, [STAGES, BLOCK_N, BLOCK_K], b.layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(ready.index(i), count=1)
        mbarrier.init(free.index(i), count=2)
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, order=[0])
    shared = gl.allocate_shared_memory(gl.float32, [16, max(BLOCK_M // 2, BLOCK_N)], plain)  # eight lines a group
    FIRST: gl.constexpr = 0
    SECOND: gl.constexpr = 1
    gl.warp_specialize(
        [
            (_products, (
                FIRST, xs, ws, ready, free, shared,
                sx_ptr, scale_ptr, zero_ptr, bias_ptr, addend_ptr, y_ptr,
                M, whole, tail, group, N, K, stride_am, part_n,
                BLOCK_M, BLOCK_N, BLOCK_K, STAGES, ALIGNED, ACTIVATION, TAIL,
            )),
            (_products, (
                SECOND, xs, ws, ready, free, shared,
                sx_ptr, scale_ptr, zero_ptr, bias_ptr, addend_ptr, y_ptr,
                M, whole, tail, group, N, K, stride_am, part_n,
                BLOCK_M, BLOCK_N, BLOCK_K, STAGES, ALIGNED, ACTIVATION, TAIL,
            )),
            (_fetches, (
                a, half, b, xs, ws, ready, free, M, whole, tail, group, N, K, BLOCK_M, BLOCK_N, BLOCK_K, STAGES, TAIL,
            )),
        ],
        [4, 1],
        [232, 24],  # registers a thread of the second group and of the warp that fetches; the first group has what is left
    )  # fmt: skip


LAUNCH = Launcher(_int8_matmul)


def described(matrix: torch.Tensor, rows: int, depth: int) -> TensorDescriptor:
    """An int8 matrix for the tensor copy engine, so many rows and columns at a time; rows lie multiples of 16 bytes apart."""
    return TensorDescriptor(matrix, list(matrix.shape), [matrix.stride(0), 1], [rows, depth], _layout(rows, depth))


@functools.cache
def _layout(rows: int, depth: int) -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout.get_default_for([rows, depth], gl.int8)
