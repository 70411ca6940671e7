"""Device times for `kernels.py`: medians over replays of CUDA graphs, the arms taking turns; on the CPU a clock."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, TypeVar

import torch

__all__ = ["Call", "copy_rate", "medians", "rotating", "set_count", "wall"]

Call = Callable[[], object]
Name = TypeVar("Name", bound=Hashable)


def medians(arms: Mapping[Name, Sequence[Call]], replays: int = 11, seconds: float = 0.006) -> dict[Name, float]:
    """Milliseconds of one call of each arm.

    Args:
        arms: each a sequence of equivalent calls on different buffers, so that no input is left in L2 by the call before.
        replays: rounds; in each, every arm is replayed once, and every other round goes backwards.
        seconds: of one replay, at least; it makes all calls of an arm, several times.
    """
    runs = {name: (_graph if torch.cuda.is_available() else _loop)(calls, seconds) for name, calls in arms.items()}
    samples: dict[Name, list[float]] = {name: [] for name in arms}
    for replay in range(replays + 1):
        for name in list(runs) if replay % 2 else reversed(list(runs)):
            run, count = runs[name]
            ms = _timed(run) / count
            if replay:  # the first one warms up
                samples[name].append(ms)
    return {name: statistics.median(times) for name, times in samples.items()}


def _graph(calls: Sequence[Call], seconds: float) -> tuple[Call, int]:
    for _ in range(2):  # loads, compiles
        wall(calls)

    def captured(rounds: int) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for call in itertools.chain.from_iterable([calls] * rounds):
                call()
        return graph

    once = captured(1)
    rounds = _rounds(seconds, min(_timed(once.replay) for _ in range(3)) / 1e3)
    return captured(rounds).replay, rounds * len(calls)


def _loop(calls: Sequence[Call], seconds: float) -> tuple[Call, int]:
    rounds = min(3, _rounds(seconds, min(wall(calls) for _ in range(2))))

    def run() -> None:
        for call in itertools.chain.from_iterable([calls] * rounds):
            call()

    return run, rounds * len(calls)


def _rounds(seconds: float, once: float) -> int:
    return max(1, min(50, round(seconds / max(once, 1e-9))))


def wall(calls: Sequence[Call]) -> float:
    """Seconds until all calls are done."""
    _synchronize()
    start = time.perf_counter()
    for call in calls:
        call()
    _synchronize()
    return time.perf_counter() - start


def _timed(run: Call) -> float:
    if not torch.cuda.is_available():
        return 1e3 * wall([run])
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def rotating(function: Callable[..., Any], sets: Sequence[Sequence[Any]]) -> list[Call]:
    """One call for each set of arguments; each keeps its own result alive, so that results rotate as well."""
    kept: list[object] = [None] * len(sets)

    def call(i: int) -> Call:
        def run() -> None:
            kept[i] = function(*sets[i])

        return run

    return [call(i) for i in range(len(sets))]


def set_count(bytes_of_a_set: int) -> int:
    """Enough sets that one round passes four times the L2 cache, between 2 and 16; 2 without CUDA."""
    if not torch.cuda.is_available():
        return 2
    l2 = torch.cuda.get_device_properties(0).L2_cache_size
    return min(16, max(2, -(-4 * l2 // bytes_of_a_set)))


def copy_rate(tiny: bool) -> float:
    """Bytes a second that torch reads and writes at best: by a copy, or by an addition of a number."""
    source = torch.ones(1 << (16 if tiny else 29), dtype=torch.bfloat16, device="cpu" if tiny else "cuda")
    target = torch.empty_like(source)
    arms = {"copy": [lambda: target.copy_(source)], "add": [lambda: torch.add(source, 1, out=target)]}
    return 2 * source.nbytes / min(medians(arms).values()) * 1e3
