"""Device times for `peers.py`: an arm and a baseline in turn over rotating buffers, and the card's ceilings."""

from __future__ import annotations

import functools
import gc
import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["Pair", "ceilings", "paired", "quick_tuning", "retune", "rotating", "set_count", "settle", "synchronize"]

Call = Callable[[], object]
_REPLAY_SECONDS = 0.003


@dataclass(frozen=True)
class Pair:
    """Medians in ms of one call; `ratio` is the median over the rounds of baseline over arm."""

    ms: float
    baseline_ms: float
    ratio: float
    rounds: int
    how: str  # "graph": replays of a CUDA graph; "loop": calls in a row; "clock": calls on the CPU


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def set_count(bytes_of_a_set: int) -> int:
    """Enough sets of buffers that one round passes four times the L2 cache, between 2 and 16; 2 without CUDA."""
    if not torch.cuda.is_available():
        return 2
    l2 = torch.cuda.get_device_properties(0).L2_cache_size
    return min(16, max(2, -(-4 * l2 // bytes_of_a_set)))


def rotating(functions: Sequence[Callable[[Any], Any]], inputs: Sequence[Any]) -> list[Call]:
    """One call for each function and its input; each keeps its own result alive, so that results rotate as well."""
    kept: list[Any] = [None] * len(inputs)

    def call(i: int) -> Call:
        def run() -> None:
            kept[i] = functions[i](inputs[i])

        return run

    return [call(i) for i in range(len(inputs))]


def paired(baseline: Sequence[Call], arm: Sequence[Call], seconds: float = 0.12) -> Pair:
    """The arm beside the baseline, one replay of each in turn and the order turned each time, for about `seconds`."""
    if torch.cuda.is_available():
        try:
            runs, how = [_graph(calls) for calls in (baseline, arm)], "graph"
        except RuntimeError:  # what a package does cannot be captured
            torch.cuda.synchronize()
            runs, how = [_loop(calls) for calls in (baseline, arm)], "loop"
        timer = _events
    else:
        runs, how, timer = [_loop(calls) for calls in (baseline, arm)], "clock", _clock
    for run, count in runs:
        timer(run, count)
    samples: tuple[list[float], list[float]] = ([], [])
    end = time.perf_counter() + seconds
    for round_ in itertools.count():
        for which in (0, 1) if round_ % 2 else (1, 0):
            samples[which].append(timer(*runs[which]))
        if round_ >= 20 or (round_ >= 4 and time.perf_counter() > end):
            break
    ratios = [base / own for base, own in zip(*samples, strict=True)]
    medians = [statistics.median(times) for times in samples]
    return Pair(medians[1], medians[0], statistics.median(ratios), len(ratios), how)


def _graph(calls: Sequence[Call]) -> tuple[Call, int]:
    _warm(calls)

    def captured(rounds: int) -> Call:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            for call in itertools.chain.from_iterable([calls] * rounds):
                call()
        return graph.replay

    once = captured(1)
    rounds = _rounds(min(_events(once, 1) for _ in range(3)))  # of the device, whatever the calls take the host
    return captured(rounds), rounds * len(calls)


def _loop(calls: Sequence[Call]) -> tuple[Call, int]:
    rounds = _rounds(1e3 * _warm(calls))

    def run() -> None:
        for call in itertools.chain.from_iterable([calls] * rounds):
            call()

    return run, rounds * len(calls)


def _rounds(ms: float) -> int:
    """How often to go through calls that take so long so that it is a few milliseconds."""
    return max(1, min(50, int(1e3 * _REPLAY_SECONDS / max(ms, 1e-6))))


def _warm(calls: Sequence[Call]) -> float:
    """Go through the calls three times; the seconds of the fastest."""
    times = []
    for _ in range(3):
        synchronize()
        start = time.perf_counter()
        for call in calls:
            call()
        synchronize()
        times.append(time.perf_counter() - start)
    return min(times)


def _events(run: Call, count: int) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / count


def _clock(run: Call, count: int) -> float:
    start = time.perf_counter()
    run()
    return (time.perf_counter() - start) * 1e3 / count


def quick_tuning() -> None:
    """Triton's autotuners time each choice for a fifth of the time. Call it before any kernel is tuned."""
    if torch.cuda.is_available():
        import triton.testing

        triton.testing.do_bench = functools.partial(triton.testing.do_bench, warmup=5, rep=20)


def settle() -> None:
    """Wait until kernels have ended that other processes had launched before they were stopped.

    A stopped process's kernels still run, and share the card; the slowest seen here, of an int8 layer of torch's with many
    rows, takes half a second.
    """
    if torch.cuda.is_available():
        time.sleep(1.0)


def retune() -> None:
    """Triton's autotuners forget what they chose while other processes used the card; what they compiled stays."""
    if not torch.cuda.is_available():
        return
    from triton.runtime.autotuner import Autotuner

    for tuner in [found for found in gc.get_objects() if type(found) is Autotuner]:
        tuner.cache.clear()
        tuner.cache_results = False


def ceilings(tiny: bool) -> dict[str, float]:
    """Bytes a second of a device copy (read and written), operations a second of a bf16 and an int8 product."""
    device = "cpu" if tiny else "cuda"
    size, nbytes = (256, 1 << 20) if tiny else (8192, 1 << 30)
    source = torch.randint(0, 255, (nbytes,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    qa, qb = (torch.randint(-127, 128, (size, size), dtype=torch.int8, device=device) for _ in range(2))
    timer = _clock if tiny else _events

    def best(run: Call) -> float:
        run()
        return statistics.median(timer(run, 1) for _ in range(7)) / 1e3

    return {
        "copy_bytes_per_s": 2 * nbytes / best(lambda: target.copy_(source)),
        "bf16_per_s": 2 * size**3 / best(lambda: a @ b),
        "int8_per_s": 2 * size**3 / best(lambda: torch._int_mm(qa, qb.t())),
    }
