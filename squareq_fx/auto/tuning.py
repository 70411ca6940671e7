"""Times of a model's int8 layers, and the tiles of the kernels that are fastest for its shapes: measured once a machine."""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import fx

from squareq_fx import ops
from squareq_fx.auto.timings import Shape, Table, Timing, machine, microseconds
from squareq_fx.ir import functions
from squareq_fx.kernels import tiles
from squareq_fx.kernels.tiles import FusedTile, MatmulTile, row_bucket
from squareq_fx.kernels.trial import trial
from squareq_fx.progress import count_bar

__all__ = ["layer_times", "tune", "unique_shapes", "use_known_tiles"]

Measure = Callable[[Shape, Any, torch.device], float]
"""Microseconds of one call of a shape's kernel with a tile; infinite if the tile does not run there."""

_LOG = logging.getLogger(__name__)
_OPERATIONS = {
    ops.int8_linear: "int8_linear",
    ops.int8_linear_parts: "int8_linear",
    ops.int8_matmul: "int8_matmul",
    ops.quantize_rows: "quantize_rows",
}


def unique_shapes(gm: fx.GraphModule, concrete: Callable[[torch.Tensor], Sequence[int]] | None = None) -> tuple[Shape, ...]:
    """What a graph and its functions multiply, each shape once.

    Args:
        concrete: gives the sizes of a `val`; by default the hints of its symbols, the sizes the graph was traced with, which
            are small for the known families: give `Binding.concrete` of the sizes that will be run.
    """
    found: dict[Shape, None] = {}
    for graph in (gm, *functions(gm).values()):
        for node in graph.graph.nodes:
            kernel = _OPERATIONS.get(node.target)
            if kernel is None:
                continue
            x = node.args[0].meta["val"]
            rows = 1
            for size in (concrete or _hints)(x)[:-1]:
                rows *= int(size)
            inner = int(x.shape[-1])
            if kernel == "quantize_rows" and len(node.args) > 1:
                inner += int(node.args[1].meta["val"].shape[-1])
            width = 0 if kernel == "quantize_rows" else _width(node)
            dtype = dict(enumerate(node.args)).get(6, node.kwargs.get("dtype")) if kernel == "int8_matmul" else x.dtype
            w8a8 = kernel == "int8_linear" and len(node.args) > 5 and node.args[5] == "w8a8"
            for name in ("quantize_rows", "int8_matmul") if w8a8 else (kernel,):
                found[Shape(name, _name(dtype), rows, 0 if name == "quantize_rows" else width, inner)] = None
    return tuple(found)


def _width(node: fx.Node) -> int:
    index = 2 if node.target is ops.int8_matmul else 1
    return int(node.args[index].meta["val"].shape[0])  # type: ignore[union-attr]


def _hints(val: torch.Tensor) -> list[int]:
    return [size if isinstance(size, int) else int(size.node.hint) for size in val.shape]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def layer_times(
    layers: Iterable[tuple[torch.dtype, int, int, int]],
    device: torch.device,
    table: Table,
    *,
    progress: bool = True,
) -> dict[tuple[torch.dtype, int, int, int], tuple[float, float]]:
    """Milliseconds of one call of a layer in w8a16 and in w8a8 (a row quantisation included), measured where the table
    does not know them, by the kernels that would run. The table is saved.

    Args:
        layers: (dtype of the activations, rows, width, inner) of each.
    """
    wanted = list(dict.fromkeys(layers))
    found = {}
    try:
        with count_bar(2 * len(wanted), "timing layers", progress) as advance:
            for dtype, rows, width, inner in wanted:
                times = []
                for mode in ("w8a16", "w8a8"):
                    shape = Shape(f"layer.{mode}", _name(dtype), rows, width, inner)
                    known = table.get(shape)
                    if known is None:
                        known = Timing(_layer_microseconds(mode, row_bucket(rows), width, inner, dtype, device))
                        table.put(shape, known)
                    times.append(known.microseconds / 1000)
                    advance(shape.key)
                found[dtype, rows, width, inner] = times[0], times[1]
    finally:
        table.save()
    return found


def _layer_microseconds(mode: str, rows: int, width: int, inner: int, dtype: torch.dtype, device: torch.device) -> float:
    x, weights = _operands(rows, width, inner, dtype, device)
    with torch.no_grad():
        return microseconds(lambda: ops.int8_linear(x, *weights, mode), device)


def _operands(
    rows: int, width: int, inner: int, dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]]:
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(rows, inner, generator=generator, device=device).to(dtype)
    q = torch.randint(-127, 128, (width, -(-inner // 64) * 64), generator=generator, device=device, dtype=torch.int8)
    scale, zeros = torch.full((width,), 1e-3, device=device), torch.zeros(width, device=device)
    return x, (q, scale, zeros, zeros)


def use_known_tiles(table: Table, device: torch.device) -> int:
    """Let the kernels take the tiles of a table, without measuring; returns how many. Tiles that are no candidates any more are
    left out.
    """
    count = 0
    for shape, timing in table:
        tile = _known_tile(shape, timing, device)
        if tile is not None:
            tiles.CHOSEN[_key(shape)] = tile
            count += 1
    return count


def tune(
    shapes: Iterable[Shape],
    device: torch.device,
    table: Table,
    *,
    measure: Measure | None = None,
    progress: bool = True,
) -> int:
    """Measure the kernels' tiles for shapes the table has none for, and let the kernels take the fastest from now on.

    Nothing is measured on the CPU, whose kernels have no tiles. The table is saved, also when it is interrupted.

    Args:
        shapes: of `unique_shapes`; kernels without tiles are passed over, and shapes the fused W8A16 kernel is not used for.
        measure: by default the kernel itself is run.

    Returns:
        how many shapes were measured.
    """
    if device.type != "cuda" and measure is None:
        return 0
    use_known_tiles(table, device)
    wanted: dict[str, Shape] = {}
    for shape in shapes:
        if _tiles(shape, device) and _key(shape) not in tiles.CHOSEN and _is_tiled(shape):
            wanted.setdefault(shape.key, Shape.of_key(shape.key))
    total = sum(len(_tiles(shape, device)) for shape in wanted.values())
    done, start = 0, time.perf_counter()
    try:
        with count_bar(total, "tuning kernels", progress) as advance:
            for shape in wanted.values():
                times = {}
                for tile in _tiles(shape, device):
                    times[tile] = (measure or _tile_microseconds)(shape, tile, device)
                    advance(shape.key)
                best = min(times, key=lambda tile: times[tile])
                if times[best] < float("inf"):
                    table.put(shape, Timing(times[best], tuple(map(int, best))))
                    tiles.CHOSEN[_key(shape)] = best
                    done += 1
    finally:
        table.save()
    _LOG.info("tiles of %d shapes measured in %.2f s", done, time.perf_counter() - start)
    return done


def _tiles(shape: Shape, device: torch.device) -> tuple[FusedTile | MatmulTile, ...]:
    return tiles.candidates(shape.kernel, shape.rows, shape.width, shape.inner, _dtype(shape), device)


def _is_tiled(shape: Shape) -> bool:
    from squareq_fx.kernels.dispatch import FUSED_MAX_ROWS
    from squareq_fx.kernels.tiles import gemv_takes

    if shape.kernel != "int8_linear":
        return True
    return shape.rows <= FUSED_MAX_ROWS[_dtype(shape)] and not gemv_takes(shape.rows, shape.width, shape.inner, _dtype(shape))


def _known_tile(shape: Shape, timing: Timing, device: torch.device) -> FusedTile | MatmulTile | None:
    return next((tile for tile in _tiles(shape, device) if tuple(tile) == timing.tile), None) if timing.tile else None


def _key(shape: Shape) -> tiles.Key:
    return tiles.key(shape.kernel, shape.rows, shape.width, shape.inner, _dtype(shape))


def _dtype(shape: Shape) -> torch.dtype:
    return getattr(torch, shape.dtype)


def _tile_microseconds(shape: Shape, tile: Any, device: torch.device) -> float:
    from triton.runtime.errors import OutOfResources

    run = trial(shape.kernel, shape.rows, shape.width, shape.inner, _dtype(shape), device)
    try:
        if not run.is_right(run(tile)):
            what = f"{shape.kernel} computes wrong sums with tile {tuple(tile)} at {shape.key} on {machine(device)}"
            warnings.warn(f"{what}; the tile is left out. Please report it.", stacklevel=4)
            return float("inf")
        return microseconds(lambda: run(tile), device)
    except OutOfResources:
        return float("inf")
