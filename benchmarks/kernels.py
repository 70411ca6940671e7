"""int8 layers on one CUDA card: are they right, and how do the two W8A16 paths compare with cuBLAS in bf16.

    python benchmarks/kernels.py --out benchmarks/results/kernels.md

Times are device times: medians over replays of CUDA graphs, the arms taking turns, every call on the next of
several sets of buffers so that no input is left in L2 by the call before. It takes some minutes, most of them
compiling and tuning, and exits with 1 if a result is inaccurate or changes between runs.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from pathlib import Path

import torch
import torch.nn.functional as F
import triton

from squareq_fx.kernels import dequantize_rows, dispatch, int8_linear, reference

Call = Callable[[], object]
Inputs = tuple[torch.Tensor, ...]

DESIGN_SHAPES = (  # M, N, K: Flux and SDXL at 1024x1024
    (4608, 3072, 3072),
    (4608, 12288, 3072),
    (4608, 3072, 15360),
    (2048, 10240, 1280),
    (2048, 1280, 1280),
    (1, 18432, 3072),
)
CROSSOVER = tuple((m, 3072, 3072) for m in (1, 16, 32, 64, 128, 256, 512, 1024, 2048))
CROSSOVER_FP32 = tuple((m, 3072, 3072) for m in (1, 16, 64))
ODD_SHAPES = ((1, 1, 1), (3, 7, 5), (17, 33, 100), (64, 257, 200), (130, 511, 1000), (256, 96, 4097))
DEQUANTIZE_TILES = (
    (4, 256, 4),
    (8, 256, 8),
    (2, 512, 4),
    (4, 512, 8),
    (2, 256, 4),
    (8, 256, 4),
    (16, 256, 8),
)


def layer(m: int, n: int, k: int, dtype: torch.dtype, zero_points: bool = False) -> Inputs:
    """x [m, k], qweight, scale, zero_point, bias on the card, random."""
    weight = torch.randn(n, k, device="cuda") * 0.05
    qweight, scale, zero_point = reference.quantize_weight(weight)
    if zero_points:
        zero_point = torch.randint(-20, 21, (n,), device="cuda").float()
    return (
        torch.randn(m, k, device="cuda").to(dtype),
        qweight,
        scale,
        zero_point,
        torch.randn(n, device="cuda"),
    )


def relative_errors(inputs: Inputs, y: torch.Tensor) -> tuple[float, float]:
    """Relative L2 errors of y and of torch's linear with the weight in x's dtype, against float64."""
    x, qweight, scale, zero_point, bias = inputs
    steps = qweight[:, : x.shape[1]].double() - zero_point.double()[:, None]
    exact = x.double() @ (steps * scale.double()[:, None]).t() + bias.double()
    weight = reference.dequantize(qweight, scale, zero_point, x.shape[1], x.dtype)
    theirs = F.linear(x, weight, bias.to(x.dtype))
    ours, torchs = (float((got.double() - exact).norm() / exact.norm()) for got in (y, theirs))
    return ours, torchs


def medians(arms: Mapping[str, Sequence[Call]], replays: int = 15) -> dict[str, float]:
    """Milliseconds of one call of each arm; an arm is a sequence of equivalent calls on different buffers."""
    graphs: dict[str, tuple[torch.cuda.CUDAGraph, int]] = {}
    for name, calls in arms.items():
        seconds = min(_wall(calls) for _ in range(3))  # the first warms up: compiles and tunes
        rounds = max(1, int(0.008 / seconds))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for call in itertools.chain.from_iterable([calls] * rounds):
                call()
        graphs[name] = graph, rounds * len(calls)
    samples: dict[str, list[float]] = {name: [] for name in arms}
    for replay in range(replays + 2):
        for name, (graph, count) in graphs.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            if replay >= 2:
                samples[name].append(start.elapsed_time(end) / count)
    return {name: statistics.median(times) for name, times in samples.items()}


def _wall(calls: Sequence[Call]) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    for call in calls:
        call()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def rotating(function: Callable[..., torch.Tensor], sets: Sequence[tuple]) -> list[Call]:
    """One call for each set of arguments; each keeps its own result alive, so that results rotate as well."""
    kept: list[object] = [None] * len(sets)

    def call(i: int) -> Call:
        def run() -> None:
            kept[i] = function(*sets[i])

        return run

    return [call(i) for i in range(len(sets))]


def set_count(bytes_of_a_set: int) -> int:
    """Enough sets that one round passes four times the L2 cache, between 2 and 16."""
    l2 = torch.cuda.get_device_properties(0).L2_cache_size
    return min(16, max(2, -(-4 * l2 // bytes_of_a_set)))


def table(title: str, header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [f"## {title}", "", "| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join([*lines, *("| " + " | ".join(map(str, row)) + " |" for row in rows), ""])


def correctness() -> tuple[str, bool]:
    rows, good = [], True
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        worst: dict[str, tuple[float, str]] = {}
        for index, (m, n, k) in enumerate(ODD_SHAPES):
            tiles = int8_linear.tiles_for(int8_linear.row_bucket(m), dtype)
            for zero_points in (False, True):
                inputs = layer(m, n, k, dtype, zero_points)
                results = {
                    "fused": int8_linear.int8_linear(*inputs, tile=tiles[index % len(tiles)]),
                    "dequantise + cuBLAS": dispatch.dequantized_linear(*inputs),
                }
                for arm, y in results.items():
                    ours, theirs = relative_errors(inputs, y)
                    share = ours / (2 * theirs + 1e-6)
                    text = f"{ours:.2e} | {theirs:.2e} | {m}x{n}x{k}{', zero points' if zero_points else ''}"
                    worst[arm] = max(worst.get(arm, (-1.0, "")), (share, text))
        for arm, (share, text) in worst.items():
            good &= share < 1
            rows.append((dtype, arm, f"{share:.2f}", text))
    header = ("dtype", "path", "share of the bound", "error", "torch's error", "at (MxNxK)")
    return table("Worst errors at odd shapes, bound 2 x torch's + 1e-6", header, rows), good


def layers(title: str, shapes: Sequence[tuple[int, int, int]], dtype: torch.dtype) -> tuple[str, bool]:
    rows, good = [], True
    paths = {"fused": int8_linear.int8_linear, "dequantised": dispatch.dequantized_linear}
    for m, n, k in shapes:
        sets = [layer(m, n, k, dtype) for _ in range(set_count(n * k + dtype.itemsize * m * (n + k)))]
        plain = [(x, reference.dequantize(*rest, k, dtype), bias.to(dtype)) for x, *rest, bias in sets]
        stable, near = True, True
        for path in paths.values():
            first = path(*sets[0])
            stable &= all(torch.equal(path(*sets[0]), first) for _ in range(4))
            ours, theirs = relative_errors(sets[0], first)
            near &= ours < 2 * theirs + 1e-6
        good &= stable and near
        ms = medians({"cuBLAS": rotating(F.linear, plain)} | {p: rotating(f, sets) for p, f in paths.items()})
        chosen = "fused" if m <= dispatch.FUSED_MAX_ROWS[dtype] else "dequantised"
        quicker = min(paths, key=lambda path: ms[path])
        rows.append(
            [
                f"{m}x{n}x{k}",
                *(f"{ms[path]:.4f}" for path in ms),
                *(f"{ms['cuBLAS'] / ms[path]:.2f}" for path in paths),
                chosen if chosen == quicker else f"{chosen} (slower)",
                tuned_tile(sets[0]),
                ("same" if stable else "DIFFER") + ("" if near else ", INACCURATE"),
            ]
        )
    header = ["MxNxK", "cuBLAS ms", "fused ms", "dequantise + cuBLAS ms", "fused ratio", "dequantise ratio"]
    header += ["dispatched", "fused tile MxNxK, warps, stages", "five runs"]
    return table(f"{title}, {dtype}, time of cuBLAS / time", header, rows), good


def tuned_tile(inputs: Inputs) -> str:
    int8_linear.int8_linear(*inputs)
    best = int8_linear._tuned.best_config
    blocks = "x".join(str(best.kwargs[f"BLOCK_{axis}"]) for axis in "MNK")
    return f"{blocks}, {best.num_warps}, {best.num_stages}"


def dequantisation() -> str:
    source = torch.randint(0, 255, (1 << 30,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    copy = 2 * source.numel() / medians({"copy": [lambda: target.copy_(source)]})["copy"] / 1e9
    rows = []
    for n, k in ((3072, 3072), (12288, 3072), (3072, 15360), (10240, 1280)):
        traffic = n * k * 3 + 8 * n
        sets = [(*layer(1, n, k, torch.bfloat16)[1:4], k, torch.bfloat16) for _ in range(set_count(traffic))]
        ms = medians(
            {
                str(tile): rotating(dequantize_rows.dequantize_rows, [(*s, tile) for s in sets])
                for tile in DEQUANTIZE_TILES
            }
        )
        own, best = str(dequantize_rows.TILES[torch.bfloat16]), min(ms, key=lambda tile: ms[tile])
        rate = {tile: traffic / ms[tile] / 1e9 for tile in (own, best)}
        rows.append(
            [
                f"{n}x{k}",
                f"{ms[own]:.4f}",
                f"{rate[own]:.2f}",
                f"{rate[own] / copy:.0%}",
                best,
                f"{rate[best]:.2f}",
            ]
        )
    header = ("NxK", "ms", "TB/s", "of the copy", "best tile", "its TB/s")
    return table(f"Row dequantisation to bf16; a 1 GiB device copy moves {copy:.2f} TB/s", header, rows)


def host_overhead() -> str:
    small = [layer(m, 256, 256, torch.bfloat16) for m in (1, 1024)]
    lines = []
    for inputs, path in zip(small, ("fused", "dequantise + cuBLAS"), strict=True):
        dispatch.int8_linear(*inputs)
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(300):
            dispatch.int8_linear(*inputs)
        lines.append(f"{path} {(time.perf_counter() - start) / 300 * 1e6:.0f} us")
        torch.cuda.synchronize()
    return f"Host time of one call, launches included: {', '.join(lines)}.\n"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="also write the report to this file")
    out = parser.parse_args().out
    if not torch.cuda.is_available():
        parser.error("this benchmark needs a CUDA device")
    torch.manual_seed(0)
    start = time.perf_counter()
    properties = torch.cuda.get_device_properties(0)
    where = f"{properties.name}, {properties.total_memory >> 30} GiB, {properties.multi_processor_count} SMs"
    what = f"torch {torch.__version__}, triton {triton.__version__}, CUDA {torch.version.cuda}"
    parts, verdicts = [f"# int8 layers\n\n{where}; {what}; {date.today()}.\n"], []
    for text, good in (
        correctness(),
        layers("Layers of Flux and SDXL", DESIGN_SHAPES, torch.bfloat16),
        layers("Crossover", CROSSOVER, torch.bfloat16),
        layers("Crossover", CROSSOVER_FP32, torch.float32),
    ):
        parts.append(text)
        verdicts.append(good)
    parts += [dequantisation(), host_overhead()]
    verdict = "All accurate and repeatable." if all(verdicts) else "SOME RESULTS ARE WRONG, see above."
    parts.append(f"{verdict} The whole run took {time.perf_counter() - start:.0f} s.\n")
    report = "\n".join(parts)
    print(report)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(report)
    return 0 if all(verdicts) else 1


if __name__ == "__main__":
    raise SystemExit(main())
