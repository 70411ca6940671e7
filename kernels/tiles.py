"""How each product is cut: the tiles the kernels choose from, and the one that was found fastest for a shape.

A table of measured times (`squareq_fx.auto.tuning`) fills `CHOSEN`; for a shape it does not have, a rule of thumb decides. What
a tile changes is the time and, in W8A16, the order in which floats are summed.
"""

from __future__ import annotations

import functools
from enum import IntEnum
from importlib.metadata import version
from importlib.util import find_spec
from typing import NamedTuple

import torch

__all__ = [
    "CHOSEN",
    "GEMV_MAX_ROWS",
    "FusedTile",
    "Key",
    "MatmulTile",
    "Tail",
    "candidates",
    "cdiv",
    "gemv_takes",
    "halves_fit",
    "key",
    "processors",
    "row_bucket",
    "tile_for",
]


GEMV_MAX_ROWS = 2
"""Rows of x that `int8_gemv` takes."""

_GEMV_LARGEST = 1 << 24
"""Weights up to which it is faster than the tiles for one row of 16 bits; for two rows they are faster. On an H200, tiles
take 4 % longer at 3072x3072 and 15 % at 640x640; it takes 20 % longer at 6144x3072, and with two rows 14 % at 1280x1280."""


class FusedTile(NamedTuple):
    """For W8A16: tokens, weight rows and depth of a tile, warps, pipeline stages, programs that share a tile's depth.

    pieces: more than 1: each step is so many depths long, and the warps of one program share them out (`int8_linear_few`).
    """

    m: int
    n: int
    k: int
    warps: int
    stages: int
    split: int
    pieces: int = 1

    @property
    def step(self) -> int:
        """Columns of x that a program multiplies at a time."""
        return self.k * self.pieces


class Tail(IntEnum):
    """What becomes of the last tiles, which do not fill the card."""

    WHOLE = 0
    DEPTH = 1
    """Cut along their depth, their sums added up at the end."""
    ROWS = 2
    """Cut into halves of as many rows each, if all of these run at once."""


class MatmulTile(NamedTuple):
    """For W8A8: rows, columns and depth of a tile, warps, pipeline stages.

    programs: how many a multiprocessor holds, each taking tile after tile; 0 for one program a tile, which has no tail.
    group: the order of the tiles, which decides what is in L2 when it is read again. Of a band of so many row blocks all are
        taken for one block of columns, then for the next (Triton's GROUP_SIZE_M); negative: a band of column blocks.
    fetching: one more warp fetches, and each half of the rows has so many warps of its own (`int8_matmul_hopper`).
    """

    m: int
    n: int
    k: int
    warps: int
    stages: int
    programs: int
    tail: Tail
    group: int = -6
    fetching: bool = False


Key = tuple[str, torch.dtype, int, int, int]
"""Kernel, dtype of its result, bucket of its rows, width, depth."""

CHOSEN: dict[Key, FusedTile | MatmulTile] = {}

_FUSED_16BIT: dict[int, tuple[FusedTile, ...]] = {
    8: (  # half as many rows of x to fetch, and of sums to exchange: 3 to 9 % faster than tiles of 16 on an H200
        FusedTile(8, 32, 128, 2, 5, 1),
        FusedTile(8, 32, 128, 2, 4, 2),
        FusedTile(8, 32, 128, 2, 4, 4),
        FusedTile(8, 32, 128, 2, 4, 8),
        FusedTile(8, 16, 128, 4, 4, 1, pieces=4),
        FusedTile(8, 16, 128, 4, 3, 1, pieces=4),
    ),
    16: (
        FusedTile(16, 32, 128, 2, 4, 1),
        FusedTile(16, 32, 128, 2, 4, 2),
        FusedTile(16, 32, 128, 2, 4, 4),
        FusedTile(16, 32, 128, 2, 4, 8),
        FusedTile(16, 32, 128, 2, 3, 2),
        FusedTile(16, 32, 128, 2, 3, 4),
        FusedTile(16, 32, 128, 2, 3, 8),
    ),
    32: (
        FusedTile(32, 32, 128, 4, 4, 1),
        FusedTile(32, 32, 128, 4, 4, 2),
        FusedTile(32, 32, 128, 4, 4, 4),
        FusedTile(32, 64, 128, 2, 3, 2),
        FusedTile(32, 64, 128, 2, 3, 8),
    ),
    64: (
        FusedTile(64, 64, 128, 4, 3, 1),
        FusedTile(64, 64, 128, 4, 3, 2),
        FusedTile(64, 64, 128, 4, 3, 4),
        FusedTile(64, 64, 64, 4, 4, 2),
        FusedTile(64, 32, 128, 4, 3, 2),
    ),
    # Four warps at most: 256x128x64 on eight warps gave other bits at every run, and wrong ones, on an H200 under
    # Triton 3.6, whose pipelined wgmma with an operand in registers is the suspect. Large M goes to cuBLAS anyway.
    128: (
        FusedTile(64, 64, 128, 4, 3, 1),
        FusedTile(64, 64, 128, 4, 3, 2),
        FusedTile(64, 64, 128, 4, 3, 4),
        FusedTile(64, 64, 64, 4, 4, 4),
        FusedTile(128, 64, 128, 4, 3, 1),
    ),
}
_FUSED_32BIT: dict[int, tuple[FusedTile, ...]] = {
    16: (FusedTile(16, 32, 64, 4, 3, 4), FusedTile(16, 64, 64, 4, 3, 1)),
    32: (FusedTile(32, 32, 32, 4, 3, 1),),
    64: (FusedTile(64, 32, 32, 4, 3, 1),),
    128: (FusedTile(64, 64, 32, 4, 3, 1),),
}

_MATMUL_LARGE = (  # these and those after them each with every one of _GROUPS
    MatmulTile(128, 128, 128, 4, 3, 2, Tail.WHOLE),
    MatmulTile(128, 128, 128, 4, 3, 2, Tail.ROWS),
    MatmulTile(128, 128, 128, 4, 3, 2, Tail.DEPTH),
    MatmulTile(64, 128, 128, 4, 3, 2, Tail.WHOLE),
)
_MATMUL_HOPPER = (
    MatmulTile(256, 128, 128, 4, 4, 1, Tail.WHOLE, fetching=True),
    MatmulTile(256, 128, 128, 4, 4, 1, Tail.ROWS, fetching=True),
    MatmulTile(128, 128, 128, 4, 6, 1, Tail.WHOLE, fetching=True),
    MatmulTile(128, 128, 128, 4, 6, 1, Tail.ROWS, fetching=True),
)
_MATMUL_ELSEWHERE = (  # on an H200 6 to 59 % slower than the others, whatever the shape
    MatmulTile(128, 64, 128, 4, 3, 2, Tail.WHOLE),
    MatmulTile(128, 128, 64, 4, 4, 2, Tail.WHOLE),
)
_GROUPS = (-6, 2)
"""On an H200 one of these is within 2 % of the best of twenty at every shape of Flux and SDXL: bands of rows where there are
many of them (16384x3072x3072: by 3 %), of columns elsewhere (4608x12288x3072: by 5 %)."""
_HOPPER_ROWS = 1024
"""Rows from which the rule of thumb takes the tiles of `int8_matmul_hopper`: on an H200 products are 3 to 20 % faster with
them at every shape of Flux and SDXL that has 2048 or more; fewer were not measured. Of its two tiles the smaller takes as
long as 141 rows should, but leaves fewer multiprocessors idle at the end."""
_DEEP = 4096
"""Depth from which it may pay to cut tiles along it: leaving and adding up sums costs as much as some steps of a product."""
_MATMUL_SMALL = (  # few warps, deep steps: what there is to compute takes less time than to wait for it
    MatmulTile(16, 32, 256, 2, 4, 0, Tail.WHOLE),
    MatmulTile(32, 64, 256, 2, 4, 0, Tail.WHOLE),
    MatmulTile(16, 64, 256, 4, 4, 0, Tail.WHOLE),
    MatmulTile(16, 32, 512, 4, 3, 0, Tail.WHOLE),
    MatmulTile(32, 32, 512, 4, 3, 0, Tail.WHOLE),
    MatmulTile(64, 64, 128, 4, 4, 0, Tail.WHOLE),
    MatmulTile(64, 128, 128, 4, 3, 2, Tail.WHOLE),
)


def cdiv(a: int, b: int) -> int:
    """a / b rounded up; `triton.cdiv`, which kernels call as well, takes the host several microseconds."""
    return -(-a // b)


def gemv_takes(rows: int, width: int, depth: int, dtype: torch.dtype) -> bool:
    """Whether `int8_gemv`, and not the fused kernel, is for a W8A16 product; for float32 that has no matrix units to use."""
    return rows <= (GEMV_MAX_ROWS if dtype == torch.float32 else 1) and (
        dtype == torch.float32 or width * depth <= _GEMV_LARGEST
    )


def row_bucket(rows: int) -> int:
    """The rows a shape is measured with: 8 up to 8, 16 up to 16; above, three significant bits: 160, 176, 192, ..."""
    if rows <= 16:
        return 8 if rows <= 8 else 16
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
        large: tuple[MatmulTile, ...] = (*_MATMUL_LARGE, *_MATMUL_ELSEWHERE)
        if _has_hopper_kernel(device):
            large = (_MATMUL_LARGE[0], *_MATMUL_HOPPER) if rows >= _HOPPER_ROWS else (*_MATMUL_LARGE, *_MATMUL_HOPPER[:2])
        few = rows <= 64 or _is_small(rows, width, device)
        tiles = _MATMUL_SMALL if few else [t._replace(group=group) for group in _GROUPS for t in large]
        fitting = (t for t in tiles if _fits(t, device) and t.m < 2 * max(rows, 16))
        return tuple(t for t in fitting if _tail_pays(t, rows, width, depth, device))
    return ()


def halves_fit(left_over: int, at_once: int) -> bool:
    """Whether there are tiles left over when `at_once` programs have taken theirs, and all their halves run at once."""
    return 0 < 2 * left_over <= at_once


def _tail_pays(tile: MatmulTile, rows: int, width: int, depth: int, device: torch.device) -> bool:
    if tile.tail == Tail.ROWS and device.type == "cuda":
        at_once = processors(device) * tile.programs
        return halves_fit(cdiv(rows, tile.m) * cdiv(width, tile.n) % at_once, at_once)
    return tile.tail != Tail.DEPTH or depth >= _DEEP


def tile_for(
    kernel: str, rows: int, width: int, depth: int, dtype: torch.dtype, device: torch.device
) -> FusedTile | MatmulTile:
    """The tile of one launch: the measured one, else a rule of thumb's."""
    found = CHOSEN.get(key(kernel, rows, width, depth, dtype))
    return found if found is not None else _guess(kernel, row_bucket(rows), width, depth, dtype, device)


@functools.cache
def _guess(kernel: str, rows: int, width: int, depth: int, dtype: torch.dtype, device: torch.device) -> FusedTile | MatmulTile:
    tiles = candidates(kernel, rows, width, depth, dtype, device)
    fused = [t for t in tiles if isinstance(t, FusedTile)]
    if fused:
        return _guess_fused(fused, rows, width, depth, processors(device))
    products = [t for t in tiles if isinstance(t, MatmulTile)]
    if rows <= 64 or _is_small(rows, width, device):
        narrow = [t for t in products if (t.m, t.n) == (16, 32) and cdiv(rows, 16) * cdiv(width, 32) <= 4 * processors(device)]
        return narrow[0] if narrow else max(products, key=lambda t: (t.m <= 32, t.m * t.n))
    return _guess_large(products, rows, width, depth, processors(device))


def _guess_fused(tiles: list[FusedTile], rows: int, width: int, depth: int, multiprocessors: int) -> FusedTile:
    # Warps share out a tile's depth while all programs run at once, in a longer pipeline if three of them fit a multiprocessor.
    # Larger products hide behind each other what a program waits for, and deeper ones want more programs.
    for tile in tiles:
        most = (3.0 if tile.stages == 4 else 4.5) * multiprocessors
        if tile.pieces > 1 and tile.step <= depth <= 8 * tile.step and cdiv(width, tile.n) <= most:
            return tile
    # The smaller a tile, the more of them a multiprocessor needs to keep memory busy; a piece of less than six steps
    # costs more than it brings.
    long = [t for t in tiles if t.pieces == 1 and (t.split == 1 or depth >= 6 * t.split * t.k)]
    enough = [t for t in long if cdiv(rows, t.m) * cdiv(width, t.n) * t.split * max(t.m, 16) >= 64 * multiprocessors]
    return enough[0] if enough else max(long, key=lambda t: t.split, default=tiles[0])


def _guess_large(tiles: list[MatmulTile], rows: int, width: int, depth: int, multiprocessors: int) -> MatmulTile:
    full = cdiv(rows, 128) * cdiv(width, 128)
    order = _GROUPS[rows > 4 * width]
    fetching = [t for t in tiles if t.fetching and t.group == order]
    if fetching and rows >= _HOPPER_ROWS and full >= multiprocessors:
        return min(fetching, key=lambda t: _turns(t, rows, width, multiprocessors) * (t.m + 13 * (t.m < 256)))
    # Halves at the end cost 4 % at a depth of 640, and bring up to 4 % from 2560 on, 10 % where all tiles are halves.
    tail = Tail.DEPTH if depth >= 8192 and full > 2 * multiprocessors else Tail.ROWS if depth >= 2048 else Tail.WHOLE
    return min(tiles, key=lambda t: (t.group != order, t.tail != tail))  # the first of the best


def _is_small(rows: int, width: int, device: torch.device) -> bool:
    """Whether tiles of 128x128 would leave more than half of the multiprocessors idle."""
    return 2 * cdiv(rows, 128) * cdiv(width, 128) < processors(device)


def _turns(tile: MatmulTile, rows: int, width: int, multiprocessors: int) -> float:
    """How many tiles come one after the other, of one program a multiprocessor; halves at the end are half a turn."""
    whole, rest = divmod(cdiv(rows, tile.m) * cdiv(width, tile.n), multiprocessors)
    return whole + (rest > 0) * (0.5 if tile.tail == Tail.ROWS else 1.0)


@functools.cache
def _has_hopper_kernel(device: torch.device) -> bool:
    """Whether `int8_matmul_hopper` runs: Gluon's words change with Triton's versions, so only those count that were tried."""
    if device.type != "cuda" or find_spec("triton") is None or torch.cuda.get_device_capability(device)[0] != 9:
        return False
    return (3, 6) <= tuple(int(part) for part in version("triton").split(".")[:2]) <= (3, 9)


def processors(device: torch.device) -> int:
    """Multiprocessors; of a device that has none those of an A100, for its tiles are looked at and not run."""
    return int(torch.cuda.get_device_properties(device).multi_processor_count) if device.type == "cuda" else 108


@functools.cache
def _shared_memory(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).shared_memory_per_block_optin)  # type: ignore[attr-defined]


def _fits(tile: FusedTile | MatmulTile, device: torch.device) -> bool:
    """Whether a tile's stages fit the shared memory of one program; bytes: int8 both, or int8 and at most 32 bits."""
    if device.type != "cuda":
        return True
    wide = 1 if isinstance(tile, MatmulTile) else 4 if tile.k <= 64 and tile.stages == 3 else 2
    depth = tile.step if isinstance(tile, FusedTile) else tile.k
    held = tile.stages * depth * (tile.m * wide + tile.n)
    return held <= _shared_memory(device)
