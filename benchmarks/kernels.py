"""int8 layers on one CUDA card: are they right, and how do they compare with cuBLAS in bf16 and with the card's memory.

    python benchmarks/kernels.py --out benchmarks/results/kernels.md

Everything is compiled first, in several processes, and the tiles are chosen; then every layer is checked (against float64, five
runs) and the times are taken: device times, medians over replays of CUDA graphs, the arms taking turns, every call on the next
of several sets of buffers so that no input is left in L2 by the call before. It takes about a minute and a half. It exits with
1 if a result is inaccurate or changes between runs; a target that is missed shows in the table.

--tiny runs all of it on toys on the CPU, whose times mean nothing.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from typing import NamedTuple

import kernels_layers as layers
import torch
import torch.nn.functional as F
from kernels_layers import Layer, Verdict, arguments, check, check_odd_shapes, float_weights
from kernels_timing import copy_rate, medians, rotating, set_count, wall

from squareq_fx.auto.timings import machine
from squareq_fx.kernels import dispatch, reference, tiles

DEQUANTISE_TILES = ((8, 256, 4), (2, 256, 4), (4, 512, 8), (16, 256, 8))
DEQUANTISE_TARGET = 0.70


class Target(NamedTuple):
    """One line of the first table."""

    what: str
    shape: str
    value: float
    target: float

    @property
    def met(self) -> bool:
        return self.value >= self.target


class Sizes(NamedTuple):
    """The shapes of a run."""

    many_rows: Sequence[Layer]
    few_rows: Sequence[Layer]
    other_rows: Sequence[Layer]
    w8a8: Sequence[Layer]
    dequantised: Sequence[tuple[int, int]]
    odd: Sequence[tuple[int, int, int]]
    side_by_side: Sequence[tuple[int, int, int]]

    @classmethod
    def of(cls, tiny: bool) -> Sizes:
        names = ("MANY_ROWS", "FEW_ROWS", "OTHER_ROWS", "W8A8", "DEQUANTISED", "ODD_SHAPES", "SIDE_BY_SIDE")
        return cls(*(layers.TINY[name] if tiny else getattr(layers, name) for name in names))  # type: ignore[arg-type]

    def fused(self) -> list[Layer]:
        """The layers of the kernel that has tiles to choose from."""
        every = (*self.many_rows, *self.few_rows, *self.other_rows)
        return [x for x in every if x.m <= dispatch.FUSED_MAX_ROWS[x.dtype] and not tiles.gemv_takes(x.m, x.n, x.k, x.dtype)]


def table(title: str, header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [f"## {title}", "", "| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join([*lines, *("| " + " | ".join(map(str, row)) + " |" for row in rows), ""])


def correctness(sizes: Sizes, device: torch.device) -> tuple[str, list[Verdict]]:
    found = check_odd_shapes(device, sizes.odd)
    for compute, group in (
        ("w8a16", (*sizes.many_rows, *sizes.few_rows, *sizes.other_rows)),
        ("w8a8", sizes.w8a8),
    ):
        for layer in group:
            found.append(check(layer, arguments(layer, device), compute))
            if layer is group[0]:
                found.append(check(layer, arguments(layer, device, zero_points=True), compute))
    worst = sorted(found, key=lambda verdict: (verdict.good, -verdict.share))
    rows = [
        (v.what, f"{v.error:.2e}", f"{v.torch_error:.2e}", f"{v.share:.2f}", "same" if v.stable else "DIFFER")
        for v in worst[: max(6, sum(not v.good for v in worst))]
    ]
    header = ("layer", "error", "torch's error", "share of 2 x torch's + 1e-6", "five runs")
    good = sum(v.good for v in found)
    return table(f"Correct: {good} of {len(found)}; the worst", header, rows), found


def dequantisation(sizes: Sizes, device: torch.device, tiny: bool) -> tuple[str, list[Target]]:
    copy = copy_rate(tiny)
    rows, targets = [], []
    for n, k in sizes.dequantised:
        traffic = n * k * 3 + 8 * n
        sets = [(*arguments(Layer(1, n, k), device)[1:4], k, torch.bfloat16) for _ in range(set_count(traffic))]
        arms = {"": rotating(reference.dequantize, sets)}
        if not tiny:
            from squareq_fx.kernels import dequantize_rows

            own = dequantize_rows.TILES[torch.bfloat16]
            choices = dict.fromkeys((own, *DEQUANTISE_TILES))
            arms = {
                "" if tile == own else str(tile): rotating(dequantize_rows.dequantize_rows, [(*s, tile) for s in sets])
                for tile in choices
            }
        ms = medians(arms)
        best = min(ms, key=lambda tile: ms[tile])
        rate = traffic / ms[""] * 1e3
        shares = f"{rate / 1e12:.2f}", f"{rate / copy:.0%}"
        rows.append((f"{n}x{k}", f"{ms['']:.4f}", *shares, best or "its own", f"{ms[best]:.4f}"))
        targets.append(Target("dequantise, of a copy's bytes/s", f"{n}x{k}", rate / copy, DEQUANTISE_TARGET))
    header = ("NxK", "ms", "TB/s", "of the copy", "fastest tile", "its ms")
    return table(f"Rows to bf16; torch copies {copy / 1e12:.2f} TB/s, read and written", header, rows), targets


def w8a16(title: str, group: Sequence[Layer], device: torch.device, detail: bool) -> tuple[str, list[Target]]:
    rows, targets = [], []
    by_products = group[0].m > 1000
    for layer in group:
        sets = [arguments(layer, device) for _ in range(set_count(layer.nbytes))]
        arms = {
            "torch": rotating(F.linear, [float_weights(s) for s in sets]),
            "ours": rotating(dispatch.run_int8_linear, sets),
        }
        if detail and device.type == "cuda":
            from squareq_fx.kernels import int8_linear

            arms["fused"] = rotating(int8_linear.int8_linear, sets)
            arms["dequantised"] = rotating(dispatch.dequantized_linear, sets)
        ms = medians(arms)
        ratio = ms["torch"] / ms["ours"]
        if layer.target is not None:
            targets.append(Target(title, str(layer), ratio, layer.target))
        others = [f"{ms['torch'] / ms[arm]:.2f}" if arm in ms else "" for arm in ("fused", "dequantised")] if detail else []
        done = 2 * layer.m * layer.n * layer.k if by_products else layer.nbytes
        rate = f"{done / ms['ours'] / 1e9:.{0 if by_products else 2}f}"
        rows.append((layer, f"{ms['torch']:.4f}", f"{ms['ours']:.4f}", f"{ratio:.2f}", *others, rate))
    more = ("fused", "dequantise + cuBLAS") if detail else ()
    header = ("MxNxK", "cuBLAS ms", "ours ms", "ratio", *more, "TFLOP/s" if by_products else "TB/s")
    return table(title, header, rows), targets


def w8a8(group: Sequence[Layer], device: torch.device) -> tuple[str, list[Target]]:
    rows, targets = [], []

    def both(layer: Layer) -> Callable[..., torch.Tensor]:
        def run(x: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
            return dispatch.run_int8_matmul(*dispatch.run_quantize_rows(x), *rest, x.dtype, parts=layer.parts)

        return run

    for layer in group:
        sets = [arguments(layer, device) for _ in range(set_count(layer.nbytes))]
        floats = [float_weights(s) for s in sets]
        quantised = [(*dispatch.quantize_rows(x), *rest, x.dtype, "none", None, layer.parts) for x, *rest in sets]
        arms = {
            "torch": rotating(F.linear, floats),
            "ours": rotating(both(layer), sets),
            "product": rotating(dispatch.run_int8_matmul, quantised),
            "quantise": rotating(dispatch.run_quantize_rows, [s[:1] for s in sets]),
        }
        if layer.parts > 1:
            cut = [(x, w.chunk(layer.parts), b.chunk(layer.parts)) for x, w, b in floats]
            arms["apart"] = rotating(lambda x, ws, bs: [F.linear(x, w, b) for w, b in zip(ws, bs, strict=True)], cut)
        ms = medians(arms)
        ratio = ms["torch"] / ms["ours"]
        if layer.target is not None:
            targets.append(Target("W8A8 with quantisation, to cuBLAS", str(layer), ratio, layer.target))
        operations = 2 * layer.m * layer.n * layer.k
        read = layer.m * (layer.k * (layer.dtype.itemsize + 1) + 8)
        rows.append(
            (
                layer,
                f"{ms['torch']:.4f}" + (f" ({ms['apart']:.4f} apart)" if "apart" in ms else ""),
                f"{ms['ours']:.4f}",
                f"{ratio:.2f}",
                f"{ms['product']:.4f}",
                f"{operations / ms['product'] / 1e9:.0f}",
                f"{ms['torch'] / ms['product']:.2f}",
                f"{ms['quantise']:.4f}",
                f"{read / ms['quantise'] / 1e9:.2f}",
            )
        )
    header = ["MxNxK", "cuBLAS ms", "ours ms", "ratio", "product ms", "TOP/s", "ratio", "quantise ms", "TB/s"]
    return table("W8A8: quantise rows, then the int8 product, with bias", header, rows), targets


def side_by_side(shapes: Sequence[tuple[int, int, int]], device: torch.device) -> str:
    """Rows of two tensors quantised where they lie, beside putting them together first."""
    rows = []
    for m, k, beside in shapes:
        read = m * ((k + beside) * 3 + 8)
        sets = [[torch.randn(m, width, device=device).bfloat16() for width in (k, beside)] for _ in range(set_count(read))]
        arms = {
            "there": rotating(dispatch.run_quantize_rows, sets),
            "together": rotating(lambda *two: dispatch.run_quantize_rows(torch.cat(two, -1)), sets),
            "alone": rotating(dispatch.run_quantize_rows, [[torch.cat(two, -1)] for two in sets]),
        }
        ms = medians(arms)
        rate = f"{read / ms['there'] / 1e9:.2f}"
        rows.append((f"{m}x({k}+{beside})", f"{ms['there']:.4f}", rate, f"{ms['together']:.4f}", f"{ms['alone']:.4f}"))
    header = ("Mx(K+L)", "where they lie, ms", "TB/s", "cat, then quantise, ms", "quantise alone, ms")
    return table("Rows of two tensors to int8", header, rows)


def tuning(sizes: Sizes, device: torch.device) -> list[str]:
    """Compile, choose tiles, and say which."""
    from kernels_tiles import compile_all, jobs_for, tune

    start = time.perf_counter()
    w8a16_layers = (*sizes.many_rows, *sizes.few_rows, *sizes.other_rows)
    odd = [Layer(*shape, dtype=dtype) for shape in sizes.odd for dtype in (torch.bfloat16, torch.float32)]
    jobs = jobs_for(w8a16_layers, sizes.w8a8, DEQUANTISE_TILES, odd)
    failed = compile_all(jobs, max(1, (os.cpu_count() or 2) - 1))
    compiled = time.perf_counter()
    found = [*tune("int8_linear", sizes.fused(), failed), *tune("int8_matmul", sizes.w8a8, failed)]
    rows = []
    for kernel, layer, ms in found:
        (best, fastest), *others = ms.items()
        bucket = tiles.row_bucket(layer.m)
        guess = tiles._guess(kernel, bucket, layer.n, layer.k, layer.dtype, device)
        plain = f"{ms[guess] / fastest:.2f}" if guess in ms else "-"
        rest = ", ".join(f"{_written(tile)} {slower / fastest:.2f}" for tile, slower in others)
        rows.append((kernel, f"{bucket}x{layer.n}x{layer.k}", _written(best), f"{fastest:.4f}", plain, rest))
    measured = time.perf_counter()
    title = f"Tiles; {len(jobs)} programs compiled in {compiled - start:.0f} s, measured in {measured - compiled:.0f} s"
    header = ("kernel", "MxNxK", "fastest (kernels/tiles.py)", "ms", "the rule of thumb's time to it", "the others' to it")
    lines = [f"{job.kernel} {job.layer} {job.tile} did not run: {error.splitlines()[0]}\n" for job, error in failed.items()]
    return [table(title, header, rows), *lines]


def _written(tile: Sequence[int]) -> str:
    return "x".join(str(int(side)) for side in tile)


def host_overhead(device: torch.device) -> str:
    lines = []
    for m, compute in ((1, "w8a16"), (16, "w8a16"), (1024, "w8a16"), (1024, "w8a8"))[: 4 if device.type == "cuda" else 2]:
        inputs = arguments(Layer(m, 256, 256), device)
        calls = [lambda inputs=inputs, compute=compute: dispatch.run_int8_linear(*inputs, compute)]
        wall(calls)
        lines.append(f"{m} rows {compute} {min(wall(calls * 50) for _ in range(3)) / 50 * 1e6:.0f} us")
    return f"A call of a 256x256 layer, launches and the kernel included: {', '.join(lines)}.\n"


def main(arguments_: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="also write the report to this file")
    parser.add_argument("--tiny", action="store_true", help="toys on the CPU, to try the script itself")
    options = parser.parse_args(arguments_)
    if options.tiny:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    if not options.tiny and not torch.cuda.is_available():
        parser.error("this benchmark needs a CUDA device; --tiny runs toys on the CPU")
    torch.manual_seed(0)
    start = time.perf_counter()
    device = torch.device("cpu") if options.tiny else torch.device("cuda", torch.cuda.current_device())
    sizes = Sizes.of(options.tiny)
    where = machine(device)
    if not options.tiny:
        card = torch.cuda.get_device_properties(device)
        where += f"; {card.total_memory >> 30} GiB, {card.multi_processor_count} multiprocessors, CUDA {torch.version.cuda}"
    tuned = [] if options.tiny else tuning(sizes, device)  # the CPU's kernels have no tiles
    correct, verdicts = correctness(sizes, device)
    dequantised, targets = dequantisation(sizes, device, options.tiny)
    parts = [dequantised]
    for title, group, detail in (
        ("W8A16 of many rows, to cuBLAS", sizes.many_rows, False),
        ("W8A16 of few rows, to cuBLAS", sizes.few_rows, False),
        ("W8A16 of other numbers of rows, for information", sizes.other_rows, True),
    ):
        text, found = w8a16(title, group, device, detail)
        parts.append(text)
        targets += found
    text, found = w8a8(sizes.w8a8, device)
    parts.append(text)
    parts.append(side_by_side(sizes.side_by_side, device))
    targets += found
    rows = [(t.what, t.shape, f"{t.value:.2f}", f"{t.target:.2f}", "met" if t.met else "MISSED") for t in targets]
    goals = table(
        f"Targets: {sum(t.met for t in targets)} of {len(targets)} met", ("what", "MxNxK", "measured", "wanted", ""), rows
    )
    wrong = [v for v in verdicts if not v.good]
    names = ", ".join(v.what for v in wrong)
    verdict = f"{len(wrong)} RESULTS ARE WRONG: {names}." if wrong else "All accurate and repeatable."
    command = " ".join(["python", "benchmarks/kernels.py", *(sys.argv[1:] if arguments_ is None else arguments_)])
    head = f"# int8 layers\n\n{where}; {date.today()}. `{command}`. Ratios are cuBLAS's time over ours, medians of one run.\n"
    tail = f"{host_overhead(device)}\n{verdict} The whole run took {time.perf_counter() - start:.0f} s.\n"
    report = "\n".join([head, goals, correct, *parts, *tuned, tail])
    print(report)
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(report)
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
