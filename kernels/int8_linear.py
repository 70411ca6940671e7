"""Triton: the fused W8A16 product. int8 weights meet 16-bit (or float32) activations in the matrix units;
scale, zero point and bias are applied to the float32 accumulator, so a float weight never exists in memory.

The product is computed transposed, (weight tile) @ (activation tile)^T: the operand that must be widened from
int8 is then the left one, which Hopper's matrix units take from registers, and few tokens need few columns.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from squareq_fx.kernels.arguments import check_linear
from squareq_fx.kernels.launch import is_interpreted, launch_device, stored_dtype

__all__ = ["Tile", "int8_linear", "row_bucket", "tiles_for"]

Tile = tuple[int, int, int, int, int]
"""(BLOCK_M tokens, BLOCK_N weight rows, BLOCK_K, warps, pipeline stages)"""

SMALLEST_BUCKET, LARGEST_BUCKET = 16, 512

_TILES_16BIT: dict[int, tuple[Tile, ...]] = {
    16: (
        (16, 16, 256, 4, 4),
        (16, 32, 128, 4, 5),
        (16, 32, 256, 4, 4),
        (16, 64, 128, 4, 5),
        (16, 64, 256, 4, 4),
        (16, 128, 128, 4, 4),
    ),
    32: ((32, 32, 128, 4, 5), (32, 64, 128, 4, 4), (32, 64, 256, 4, 3), (32, 128, 128, 4, 4)),
    64: ((32, 64, 128, 4, 4), (64, 64, 128, 4, 4), (64, 64, 64, 4, 5)),
    # Four warps at most: 256x128x64 on eight warps gave other bits at every run, and wrong ones, on an H200 under
    # Triton 3.6, whose pipelined wgmma with an operand in registers is the suspect. Large M goes to cuBLAS anyway.
    128: ((64, 64, 128, 4, 4), (128, 64, 64, 4, 4)),
    256: ((64, 64, 128, 4, 4), (128, 64, 64, 4, 4)),
    512: ((64, 64, 128, 4, 4), (128, 64, 64, 4, 4)),
}
_TILES_32BIT: dict[int, tuple[Tile, ...]] = {
    16: ((16, 32, 64, 4, 3), (16, 64, 32, 4, 3), (16, 64, 64, 4, 3)),
    32: ((32, 32, 32, 4, 3), (32, 64, 32, 4, 3)),
    64: ((32, 64, 32, 4, 3), (64, 64, 32, 4, 3)),
    128: ((64, 64, 32, 4, 3), (64, 128, 32, 8, 3)),
    256: ((64, 64, 32, 4, 3), (64, 128, 32, 8, 3)),
    512: ((64, 64, 32, 4, 3), (64, 128, 32, 8, 3)),
}
_INTERPRETER_TILE: Tile = (16, 32, 64, 4, 1)
"""Small, so that a test of a few dozen rows and columns has several tiles and a ragged last one."""


def row_bucket(rows: int) -> int:
    """The power of two from 16 to 512 that M rows are tuned under; every M of a bucket shares one tile."""
    return min(max(SMALLEST_BUCKET, triton.next_power_of_2(rows)), LARGEST_BUCKET)


def tiles_for(bucket: int, dtype: torch.dtype) -> tuple[Tile, ...]:
    """The tiles the autotuner tries for one bucket; few, because each costs a compilation."""
    return (_TILES_32BIT if dtype == torch.float32 else _TILES_16BIT)[bucket]


@triton.heuristics({"EVEN_K": lambda args: args["K"] % args["BLOCK_K"] == 0})
@triton.jit(do_not_specialize=["M", "bucket"])
def _int8_linear(
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
    bucket,  # only the autotuner reads it
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    WIDEN: tl.constexpr,
):
    # Tiles of up to eight row blocks share their weight tile while it is in L2.
    pid = tl.program_id(0)
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    first_m = (pid // (8 * tiles_n)) * 8
    height = tl.minimum(tiles_m - first_m, 8)
    pid_m = first_m + (pid % (8 * tiles_n)) % height
    pid_n = (pid % (8 * tiles_n)) // height

    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    # A row past the end reads row 0 and is not stored, which keeps row masks out of the loop.
    rows_m = tl.where(offs_m < M, offs_m, 0).to(tl.int64)
    rows_n = tl.where(offs_n < N, offs_n, 0).to(tl.int64)
    x_tile = x_ptr + rows_m[None, :] * stride_xm + offs_k[:, None]
    q_tile = q_ptr + rows_n[:, None] * stride_qn + offs_k[None, :]
    scale = tl.load(scale_ptr + rows_n)
    zero = tl.load(zero_ptr + rows_n)

    acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    for k in range(0, K, BLOCK_K):
        if EVEN_K:
            x = tl.load(x_tile + k)
            q = tl.load(q_tile + k)
        else:
            x = tl.load(x_tile + k, mask=offs_k[:, None] < K - k, other=0.0)
            q = tl.load(q_tile + k, mask=offs_k[None, :] < packed_k - k, other=0)
        if WIDEN:
            x = x.to(tl.float32)
        w = q.to(x.dtype)  # exact: eight bits fit every significand
        if x_ptr.dtype.element_ty == tl.float32:
            w -= zero[:, None]
        acc = tl.dot(w, x, acc, input_precision="ieee")

    # q - zero need not fit 16 bits, so it comes in by linearity; a symmetric slab skips this pass over x.
    if x_ptr.dtype.element_ty != tl.float32:  # noqa: SIM102  (decided when compiling, the inner one by the data)
        if tl.sum((zero != 0.0).to(tl.int32), axis=0) > 0:
            total = tl.zeros((BLOCK_M,), dtype=tl.float32)
            for k in range(0, K, BLOCK_K):
                x = tl.load(x_tile + k, mask=offs_k[:, None] < K - k, other=0.0)
                total += tl.sum(x.to(tl.float32), axis=0)
            acc -= zero[:, None] * total[None, :]
    acc *= scale[:, None]
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + rows_n)[:, None]
    y_tile = y_ptr + offs_m.to(tl.int64)[:, None] * N + offs_n[None, :]
    inside = (offs_m < M)[:, None] & (offs_n < N)[None, :]
    tl.store(y_tile, tl.trans(acc).to(y_ptr.dtype.element_ty), mask=inside)


def _config(tile: Tile) -> triton.Config:
    block_m, block_n, block_k, warps, stages = tile
    blocks = {"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k}
    return triton.Config(blocks, num_warps=warps, num_stages=stages)


def _tile(config: triton.Config) -> Tile:
    blocks = config.kwargs
    return blocks["BLOCK_M"], blocks["BLOCK_N"], blocks["BLOCK_K"], config.num_warps, config.num_stages


def _prune(configs: list[triton.Config], named_args: dict[str, Any], **_: Any) -> list[triton.Config]:
    wanted = tiles_for(named_args["bucket"], named_args["x_ptr"].dtype)
    return [config for config in configs if _tile(config) in wanted]


def _brief_bench(launch: Any, quantiles: Any) -> Any:
    # Triton's default of 125 ms a tile would make the first forward of a large model take minutes.
    return triton.testing.do_bench(launch, warmup=5, rep=25, quantiles=quantiles)


_EVERY_TILE = dict.fromkeys(
    tile for table in (_TILES_16BIT, _TILES_32BIT) for tiles in table.values() for tile in tiles
)
_tuned = triton.autotune(
    configs=[_config(tile) for tile in _EVERY_TILE],
    key=["N", "K", "bucket"],
    prune_configs_by={"early_config_prune": _prune},
    do_bench=_brief_bench,
)(_int8_linear)
INTERPRETED = is_interpreted(_int8_linear.fn)


def int8_linear(
    x: torch.Tensor,
    qweight: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor,
    bias: torch.Tensor | None = None,
    tile: Tile | None = None,
) -> torch.Tensor:
    """(x @ q^T - zero_point * rowsum(x)) * scale + bias in float32, rounded once to x's dtype.

    Args:
        x: [..., in] bf16, fp16 or fp32, any strides; qweight: [out, K' >= in] int8; scale, zero_point: [out]
            float32; bias: [out] float32 or None.
        tile: fixes the tile; by default the fastest of `tiles_for` is measured once per (out, in, bucket).
    Returns:
        [..., out] in x's dtype. No atomics: for one tile a function of the inputs alone, bit for bit.
    Raises:
        TypeError, ValueError: an argument's dtype, shape or device is wrong, naming it.
    """
    check_linear(x, qweight, scale, zero_point, bias)
    in_features, out_features = x.shape[-1], qweight.shape[0]
    rows = x.shape[:-1].numel()
    y = torch.empty((*x.shape[:-1], out_features), dtype=stored_dtype(x.dtype, INTERPRETED), device=x.device)
    if y.numel() == 0:
        return y.to(x.dtype)
    x2 = x.reshape(rows, in_features)
    if x2.stride(1) != 1:
        x2 = x2.contiguous()
    if qweight.stride(1) != 1:
        qweight = qweight.contiguous()
    args = (
        x2,
        qweight,
        scale.contiguous(),
        zero_point.contiguous(),
        None if bias is None else bias.contiguous(),
        y,
        rows,
        out_features,
        in_features,
        qweight.shape[1],
        x2.stride(0),
        qweight.stride(0),
        row_bucket(rows),
    )
    if tile is None and INTERPRETED:
        tile = _INTERPRETER_TILE
    widen = y.dtype != x.dtype  # the interpreter multiplies bfloat16 as integers
    with launch_device(x, INTERPRETED):
        if tile is None:
            _tuned[_grid](*args, WIDEN=widen)
        else:
            _int8_linear[_grid](*args, WIDEN=widen, **_config(tile).all_kwargs())
    return y.to(x.dtype)


def _grid(meta: dict[str, int]) -> tuple[int]:
    return (triton.cdiv(meta["M"], meta["BLOCK_M"]) * triton.cdiv(meta["N"], meta["BLOCK_N"]),)
