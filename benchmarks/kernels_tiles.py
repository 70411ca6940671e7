"""For `kernels.py`: compile every kernel it launches in several processes, then find the fastest tile for each shape."""

from __future__ import annotations

import functools
import multiprocessing
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import NamedTuple

import torch
from kernels_layers import Layer, arguments
from kernels_timing import medians, set_count
from triton.errors import TritonError

from squareq_fx.kernels import dispatch, tiles
from squareq_fx.kernels.counters import COUNTERS
from squareq_fx.kernels.tiles import FusedTile, MatmulTile
from squareq_fx.kernels.trial import trial

__all__ = ["Job", "Tuned", "compile_all", "jobs_for", "tune"]

Tile = FusedTile | MatmulTile


class Job(NamedTuple):
    """One launch. kernel: that of a tile, "layer" (a layer as it is dispatched, both ways) or "dequantise"."""

    kernel: str
    layer: Layer
    tile: tuple[int, ...] | None = None


def jobs_for(
    w8a16: Iterable[Layer], w8a8: Iterable[Layer], dequantised: Iterable[tuple[int, int, int]], odd: Iterable[Layer]
) -> list[Job]:
    """A launch for every program that Triton has to make: other shapes take one of these from its cache on disk."""
    found: dict[object, Job] = {}
    for kernel, layers in (("int8_linear", w8a16), ("int8_matmul", w8a8)):
        for layer in layers:
            for tile in tiles.candidates(kernel, layer.m, layer.n, layer.k, layer.dtype, _device()):
                job = Job(kernel, layer, tile)
                found.setdefault(_program(job), job)
    for layer in (*w8a16, *w8a8):
        found.setdefault(("layer", min(layer.m, 3), layer.k, layer.dtype), Job("layer", layer))
    for layer in odd:
        found.setdefault(("odd", layer), Job("layer", layer))
    for tile in dequantised:
        found.setdefault(("dequantise", tile), Job("dequantise", Layer(1, 3072, 3072), tile))
    return list(found.values())


def _device() -> torch.device:
    """The card; the CPU under Triton's interpreter, which is for tests."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def _program(job: Job) -> tuple[object, ...]:
    """What Triton compiles by, of a tile's launch on a shape that 16 divides."""
    from squareq_fx.kernels.int8_matmul import _schedule

    layer, tile = job.layer, job.tile
    rows = tiles.row_bucket(layer.m)
    if isinstance(tile, MatmulTile):
        cut: object = _schedule(rows, layer.n, layer.k, tile, _device()).kind
        return job.kernel, layer.dtype, tile[:5], layer.k % tile.k == 0, cut
    assert isinstance(tile, FusedTile)
    split, programs = min(tile.split, -(-layer.k // tile.k)), -(-rows // tile.m) * -(-layer.n // tile.n)
    cut = split > 1 and programs <= COUNTERS
    return job.kernel, layer.dtype, tile[:5], tile.pieces, layer.k % tile.step == 0, cut


def compile_all(jobs: Sequence[Job], workers: int) -> dict[Job, str]:
    """Launch each once, in so many processes. Returns what went wrong; if a process dies, what was still to do is compiled
    where it is launched next.
    """
    failed: dict[Job, str] = {}
    with ProcessPoolExecutor(min(workers, len(jobs)), mp_context=multiprocessing.get_context("spawn")) as pool:
        futures = {job: pool.submit(_launch, job) for job in jobs}
        for job, future in futures.items():
            try:
                error = future.result()
            except BrokenProcessPool:
                break
            if error:
                failed[job] = error
    return failed


def _launch(job: Job) -> str:
    device, layer = _device(), job.layer
    try:
        if isinstance(job.tile, FusedTile | MatmulTile):
            trial(job.kernel, layer.m, layer.n, layer.k, layer.dtype, device)(job.tile)
        elif job.kernel == "dequantise":
            from squareq_fx.kernels.dequantize_rows import dequantize_rows

            dequantize_rows(*arguments(layer, device)[1:4], layer.k, layer.dtype, job.tile)  # type: ignore[arg-type]
        else:
            inputs = arguments(layer, device)
            for compute in ("w8a16", "w8a8"):
                dispatch.int8_linear(*inputs, compute)
        if device.type == "cuda":
            torch.cuda.synchronize()
    except (TritonError, RuntimeError, ValueError, TypeError, AssertionError) as error:  # a tile that does not run is left out
        return f"{type(error).__name__}: {error}"
    return ""


class Tuned(NamedTuple):
    """The milliseconds of a shape's tiles, the fastest first."""

    kernel: str
    layer: Layer
    ms: dict[Tile, float]


def tune(kernel: str, layers: Iterable[Layer], failed: Iterable[Job]) -> list[Tuned]:
    """Put each shape's fastest tile into `tiles.CHOSEN`; shapes whose rows lie in one bucket are one."""
    broken = {job.tile for job in failed}
    found: dict[tiles.Key, Tuned] = {}
    for layer in layers:
        key = tiles.key(kernel, layer.m, layer.n, layer.k, layer.dtype)
        if key in found:
            continue
        shape = (layer.m, layer.n, layer.k, layer.dtype, _device())
        choices = [tile for tile in tiles.candidates(kernel, *shape) if tile not in broken]
        if not choices:
            continue
        trials = [trial(kernel, *shape) for _ in range(set_count(layer.nbytes))]
        ms = medians({tile: [functools.partial(run, tile) for run in trials] for tile in choices}, replays=5, seconds=0.003)
        tuned = Tuned(kernel, layer, dict(sorted(ms.items(), key=lambda item: item[1])))
        found[key] = tuned
        tiles.CHOSEN[key] = next(iter(tuned.ms))
    return list(found.values())
