"""How each product is cut: the tiles the kernels choose from, and the one that was found fastest for a shape.

A table of measured times (`squareq_fx.auto.tuning`) fills `CHOSEN`; for a shape it does not have, a rule of thumb decides. What
a tile changes is the time and, in W8A16, the order in which floats are summed.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

__all__ = [
    "CHOSEN",
    "GEMV_MAX_ROWS",
    "FusedTile",
    "Key",
    "MatmulTile",
    "candidates",
    "gemv_takes",
    "key",
    "row_bucket",
    "tile_for",
]


GEMV_MAX_ROWS = 2
"""Rows of x that `int8_gemv` takes: its product is one of memory alone."""

_GEMV_DEEPEST = 8192
"""Depth up to which it was faster than the fused kernel for two rows of 16 bits on an H200 (1280, 3072; not 12288)."""


class FusedTile(NamedTuple):
    """For W8A16: tokens, weight rows and depth of a tile, warps, pipeline stages, programs that share a tile's depth.

    slices: parts of each step of the depth, for as many groups of warps; 1 if the warps share the tile's weight rows.
    """

    m: int
    n: int
    k: int
    warps: int
    stages: int
    split: int
    slices: int = 1


class MatmulTile(NamedTuple):
    """For W8A8: rows, columns and depth of a tile, warps, pipeline stages.

    programs: how many a multiprocessor holds, each taking tile after tile; 0 for one program a tile.
    split: 1 if tiles that do not fill the card at the end are cut along their depth.
    """

    m: int
    n: int
    k: int
    warps: int
    stages: int
    programs: int
    split: int


Key = tuple[str, torch.dtype, int, int, int]
"""Kernel, dtype of its result, bucket of its rows, width, depth."""

CHOSEN: dict[Key, FusedTile | MatmulTile] = {}

_FUSED_16BIT: dict[int, tuple[FusedTile, ...]] = {
    16: (
        FusedTile(16, 32, 256, 2, 4, 1),
        FusedTile(16, 32, 256, 2, 4, 2),
        FusedTile(16, 32, 256, 2, 4, 4),
        FusedTile(16, 32, 256, 8, 4, 1, 8),
        FusedTile(16, 32, 256, 8, 4, 2, 8),
        FusedTile(16, 32, 256, 4, 4, 2, 4),
        FusedTile(16, 16, 512, 8, 4, 1, 8),
    ),
    32: (FusedTile(32, 32, 128, 4, 5, 1), FusedTile(32, 64, 128, 4, 4, 1), FusedTile(32, 64, 128, 4, 4, 4)),
    64: (FusedTile(64, 64, 128, 4, 4, 1), FusedTile(64, 64, 128, 4, 4, 2), FusedTile(64, 32, 128, 4, 4, 4)),
    # Four warps at most: 256x128x64 on eight warps gave other bits at every run, and wrong ones, on an H200 under
    # Triton 3.6, whose pipelined wgmma with an operand in registers is the suspect. Large M goes to cuBLAS anyway.
    128: (FusedTile(64, 64, 128, 4, 4, 1), FusedTile(128, 64, 64, 4, 4, 1), FusedTile(128, 64, 64, 4, 4, 2)),
}
_FUSED_32BIT: dict[int, tuple[FusedTile, ...]] = {
    16: (FusedTile(16, 32, 64, 4, 3, 4), FusedTile(16, 64, 64, 4, 3, 1)),
    32: (FusedTile(32, 32, 32, 4, 3, 1),),
    64: (FusedTile(64, 32, 32, 4, 3, 1),),
    128: (FusedTile(64, 64, 32, 4, 3, 1),),
}

_MATMUL_LARGE = (
    MatmulTile(128, 128, 128, 4, 3, 2, 0),
    MatmulTile(128, 128, 128, 4, 3, 2, 1),
    MatmulTile(64, 128, 128, 4, 3, 2, 0),
    MatmulTile(128, 64, 128, 4, 3, 2, 0),
    MatmulTile(128, 128, 64, 4, 4, 2, 0),
)
_MATMUL_SMALL = (
    MatmulTile(64, 128, 128, 4, 3, 0, 0),
    MatmulTile(64, 64, 128, 4, 4, 0, 0),
    MatmulTile(32, 64, 256, 4, 3, 0, 0),
    MatmulTile(16, 64, 256, 4, 3, 0, 0),
)


def gemv_takes(rows: int, depth: int, dtype: torch.dtype) -> bool:
    """Whether `int8_gemv`, and not the fused kernel, is for a W8A16 product; for float32 that has no matrix units to use."""
    return rows == 1 or (rows == GEMV_MAX_ROWS and (depth <= _GEMV_DEEPEST or dtype == torch.float32))


def row_bucket(rows: int) -> int:
    """The rows a shape is measured with. Up to 16 they are one bucket; above, three significant bits: 160, 176, 192, ..."""
    if rows <= 16:
        return 16
    step = 1 << max(rows.bit_length() - 4, 0)
    return -(-rows // step) * step


def key(kernel: str, rows: int, width: int, depth: int, dtype: torch.dtype) -> Key:
    """Under what a shape's tile is kept in `CHOSEN`."""
    return kernel, dtype, row_bucket(rows), width, depth


def candidates(
    kernel: str, rows: int, width: int, depth: int, dtype: torch.dtype, device: torch.device
) -> tuple[FusedTile | MatmulTile, ...]:
    """The tiles worth measuring for one shape on a device; few, as each costs a compilation. None for other kernels."""
    if kernel == "int8_linear":
        table = _FUSED_32BIT if dtype == torch.float32 else _FUSED_16BIT
        bucket = next((size for size in table if rows <= size), 128)
        return tuple(tile for tile in table[bucket] if _fits(tile, device))
    if kernel == "int8_matmul":
        tiles = _MATMUL_SMALL if rows <= 64 else _MATMUL_LARGE
        return tuple(t for t in tiles if _fits(t, device) and t.m < 2 * max(rows, 16) and not (t.split and depth < 4096))
    return ()


def tile_for(
    kernel: str, rows: int, width: int, depth: int, dtype: torch.dtype, device: torch.device
) -> FusedTile | MatmulTile:
    """The tile of one launch: the measured one, else a rule of thumb's."""
    found = CHOSEN.get(key(kernel, rows, width, depth, dtype))
    return found if found is not None else _guess(kernel, row_bucket(rows), width, depth, dtype, device)


@functools.cache
def _guess(
    kernel: str, rows: int, width: int, depth: int, dtype: torch.dtype, device: torch.device
) -> FusedTile | MatmulTile:
    tiles = candidates(kernel, rows, width, depth, dtype, device)
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    if kernel == "int8_linear":
        # Enough programs to keep some 4 MB on their way: a split fills the card where there are few rows of tiles.
        enough = [t for t in tiles if -(-rows // t.m) * -(-width // t.n) * t.split >= 2 * processors]
        return enough[0] if enough else max(tiles, key=lambda t: t.split)  # type: ignore[union-attr,arg-type,return-value]
    full = -(-rows // 128) * -(-width // 128)
    if rows > 64 and full < 0.5 * processors:  # half tiles leave fewer multiprocessors idle
        return next((t for t in tiles if t.m == 64), tiles[0])
    if depth >= 8192 and full > 2 * processors:
        return next((t for t in tiles if isinstance(t, MatmulTile) and t.split), tiles[0])
    return tiles[0]


@functools.cache
def _shared_memory(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).shared_memory_per_block_optin)  # type: ignore[attr-defined]


def _fits(tile: FusedTile | MatmulTile, device: torch.device) -> bool:
    """Whether a tile's stages fit the shared memory of one program; bytes: int8 both, or int8 and at most 32 bits."""
    if device.type != "cuda":
        return True
    wide = 1 if isinstance(tile, MatmulTile) else 4 if tile.k <= 64 and tile.stages == 3 else 2
    held = tile.stages * tile.k * (tile.m * wide + tile.n)
    return held <= _shared_memory(device)
