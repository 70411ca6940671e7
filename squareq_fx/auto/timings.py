"""Measured times of kernels, kept in a file: one for each device, driver, torch and Triton, as they say nothing elsewhere."""

from __future__ import annotations

import json
import os
import platform
import re
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from squareq_fx.durable import write_whole
from squareq_fx.kernels.tiles import row_bucket

__all__ = ["Shape", "Table", "Timing", "machine", "microseconds", "table_path"]

_VERSION = 5
"""Goes up when kernels or their tiles change so much that older times mislead; files of an older version count as empty."""
_ENOUGH_SECONDS = 0.02
_MOST_CALLS = 50


@dataclass(frozen=True, order=True)
class Shape:
    """One product: [rows, inner] activations of `dtype` with a [width, inner] weight, by the operation `kernel`."""

    kernel: str
    dtype: str
    rows: int
    width: int
    inner: int

    @property
    def key(self) -> str:
        """Under what it is kept: products whose rows lie in one bucket share an entry."""
        return f"{self.kernel} {self.dtype} {row_bucket(self.rows)}x{self.width}x{self.inner}"

    @classmethod
    def of_key(cls, key: str) -> Shape:
        """The shape of a bucket's own number of rows. Raises ValueError if `key` is no such text."""
        kernel, dtype, sizes = key.split(" ")
        rows, width, inner = map(int, sizes.split("x"))
        return cls(kernel, dtype, rows, width, inner)


@dataclass(frozen=True)
class Timing:
    """The fastest time of one call, and the tile it was reached with; no tile where the kernel takes none."""

    microseconds: float
    tile: tuple[int, ...] | None = None


def machine(device: torch.device | str) -> str:
    """What times depend on besides the shape, in one line: the device, its driver, torch and Triton."""
    device = torch.device(device)
    if device.type == "cuda":
        name, driver = torch.cuda.get_device_name(device), f", driver {_driver()}"
    else:
        name, driver = f"{platform.processor() or platform.machine()} CPU, {torch.get_num_threads()} threads", ""
    try:
        triton = f", triton {metadata.version('triton')}"
    except metadata.PackageNotFoundError:
        triton = ""
    return f"{name}{driver}, torch {torch.__version__}{triton}"


def _driver() -> str:
    try:
        found = re.search(r"\b(\d+\.\d+(\.\d+)?)\b", Path("/proc/driver/nvidia/version").read_text(encoding="utf-8"))
    except OSError:
        found = None
    return found.group(1) if found else f"for CUDA {torch._C._cuda_getDriverVersion()}"  # type: ignore[attr-defined]


def table_path(device: torch.device | str) -> Path:
    """The file of this machine's table: below `$SQUAREQ_CACHE_DIR`, else below `~/.cache/squareq_fx`, in `tuning/`."""
    root = os.environ.get("SQUAREQ_CACHE_DIR")
    folder = Path(root) if root else Path.home() / ".cache" / "squareq_fx"
    return folder / "tuning" / (re.sub(r"[^A-Za-z0-9.+]+", "-", machine(device)) + ".json")


class Table:
    """Times by `Shape`, in memory until `save`.

    Args:
        path: the file; read at once if it is there. A damaged one is warned of and counts as empty.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._entries: dict[str, Timing] = self._read(warn=True)
        self._new: dict[str, Timing] = {}

    @classmethod
    def of(cls, device: torch.device | str) -> Table:
        """This machine's table."""
        return cls(table_path(device))

    def get(self, shape: Shape) -> Timing | None:
        return self._entries.get(shape.key)

    def put(self, shape: Shape, timing: Timing) -> None:
        self._entries[shape.key] = self._new[shape.key] = timing

    def __iter__(self) -> Iterator[tuple[Shape, Timing]]:
        return ((Shape.of_key(key), timing) for key, timing in self._entries.items())

    def __len__(self) -> int:
        return len(self._entries)

    def save(self) -> None:
        """Write what is new into the file, beside what other processes wrote there since it was read.

        A folder that cannot be written is warned of: the times are then measured again by the next process.
        """
        if not self._new:
            return
        merged = {**self._read(warn=False), **self._new}
        entries = {key: {"microseconds": t.microseconds, "tile": t.tile} for key, t in sorted(merged.items())}
        document = {"squareq_tuning": _VERSION, "entries": entries}
        try:
            write_whole(self.path, (json.dumps(document, indent=1) + "\n").encode())
        except OSError as error:
            warnings.warn(f"measured times cannot be kept in {self.path}: {error}; set SQUAREQ_CACHE_DIR", stacklevel=2)
            return
        self._entries, self._new = {**merged, **self._entries}, {}

    def _read(self, warn: bool) -> dict[str, Timing]:
        try:
            text = self.path.read_text(encoding="utf-8")
        except FileNotFoundError:
            return {}
        except (OSError, UnicodeDecodeError) as error:
            return self._unreadable(error, warn)
        try:
            document = json.loads(text)
            version = document["squareq_tuning"]
            if version in range(1, _VERSION):
                return {}
            if version != _VERSION:
                raise ValueError(f"version {version!r}")
            return {Shape.of_key(key).key: _timing(entry) for key, entry in document["entries"].items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            return self._unreadable(error, warn)

    def _unreadable(self, error: Exception, warn: bool) -> dict[str, Timing]:
        if warn:
            warnings.warn(f"the measured times in {self.path} cannot be read ({error}); measuring again", stacklevel=4)
        return {}


def _timing(entry: Any) -> Timing:
    microseconds, tile = float(entry["microseconds"]), entry["tile"]
    if not 0 < microseconds < float("inf") or not (tile is None or all(type(n) is int for n in tile)):
        raise ValueError(f"no time and tile: {entry!r}")
    return Timing(microseconds, None if tile is None else tuple(tile))


def microseconds(call: Callable[[], Any], device: torch.device) -> float:
    """The median of repeated calls; on CUDA of calls in a recorded graph, so that the host's part does not count."""
    call()  # compiles, and brings everything into the caches it will be found in
    if device.type == "cuda":
        return _microseconds_on_cuda(call, device)
    times: list[float] = []
    while len(times) < 3 or (sum(times) < _ENOUGH_SECONDS and len(times) < _MOST_CALLS):
        begun = time.perf_counter()
        call()
        times.append(time.perf_counter() - begun)
        if times[0] > 1.0:
            break
    return statistics.median(times) * 1e6


def _microseconds_on_cuda(call: Callable[[], Any], device: torch.device, calls: int = 10, rounds: int = 5) -> float:
    times = []
    with torch.cuda.device(device):
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(calls):
                call()
        graph.replay()
        for _ in range(rounds):
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) * 1000 / calls)
    return statistics.median(times)
