"""One streamed training step as torch's profiler saw it: what ran on the compute stream, what on the copy stream, and when."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from training_arms import Arm

__all__ = ["Span", "Trace", "draw", "record"]

COLOURS = {
    "matrix product": "#2563eb",
    "attention": "#7c4dbd",
    "dequantise": "#0f9d76",
    "other kernels": "#9aa5b1",
    "host to device": "#ea8a1f",
}
_PRODUCTS = ("gemm", "nvjet", "cutlass", "xmma", "conv", "fprop", "dgrad", "int8_linear", "addmm", "::mm", "matmul", "::linear")
_ZOOM = 1 / 12  # of the step, a side of the moment the backward begins
_JOIN_US = 3.0  # gaps of a launch between kernels of one kind are not drawn
_SMALL_COPY = 1 << 16  # bytes; the scalars a step sends are no weights


@dataclass(frozen=True)
class Span:
    """An interval of one lane, in ms from the beginning of the step."""

    kind: str
    start: float
    end: float


@dataclass(frozen=True)
class Trace:
    """One step on the device.

    Args:
        compute, copy: the spans of each stream, by start.
        backward: when the compute stream went from forward and loss to the backward.
        end: when the last of both streams was over.
    """

    compute: tuple[Span, ...]
    copy: tuple[Span, ...]
    backward: float
    end: float

    def figures(self) -> dict[str, float]:
        """Milliseconds: the step, its halves, compute and copies busy, and how long copies ran while compute was busy."""
        compute, copy = _union(self.compute), _union(self.copy)
        both = sum(max(0.0, min(a[1], b[1]) - max(a[0], b[0])) for a in copy for b in compute)
        busy, copying = (sum(end - start for start, end in spans) for spans in (compute, copy))
        return {
            "step_ms": self.end,
            "forward_ms": self.backward,
            "compute_ms": busy,
            "copy_ms": copying,
            "copy_under_compute_ms": both,
            "idle_ms": self.end - busy,
        }


def record(arm: Arm) -> Trace:
    """Profiles forward, loss and backward of one step.

    Raises:
        RuntimeError: the profiler saw no kernel.
    """
    on_card = arm.target.device.type == "cuda"
    kind = torch.profiler.ProfilerActivity.CUDA if on_card else torch.profiler.ProfilerActivity.CPU
    # On the card a kernel that spins for a few cycles marks the place in the stream; on the CPU an annotation does.
    mark = (lambda: torch.cuda._sleep(100)) if on_card else _annotate
    with torch.profiler.profile(activities=[kind]) as profile:
        mark()
        arm.loss_and_gradients(mark)
        if on_card:
            torch.cuda.synchronize()
    arm.optimizer.zero_grad(set_to_none=True)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        events = [e for e in json.loads(path.read_text())["traceEvents"] if e.get("ph") == "X"]
    return _from_card(events) if on_card else _from_cpu(events)


def _annotate() -> None:
    with torch.profiler.record_function("mark"):
        pass


def _from_card(events: list[dict[str, Any]]) -> Trace:
    kernels = [e for e in events if e.get("cat") == "kernel"]
    marks = sorted(e["ts"] for e in kernels if "spin_kernel" in e["name"])
    if len(marks) != 2:
        raise RuntimeError(f"the profiler saw {len(kernels)} kernels and {len(marks)} of the 2 marks")
    moves = [e for e in events if e.get("cat") in ("gpu_memcpy", "gpu_memset")]
    copies = [e for e in moves if "HtoD" in e["name"] and e.get("args", {}).get("bytes", _SMALL_COPY) >= _SMALL_COPY]
    inside = [e for e in moves if "HtoD" not in e["name"]]  # on the device, so part of the computation
    return _trace(((_kernel_kind(e["name"]), e) for e in (*kernels, *inside)), copies, marks)


def _from_cpu(events: list[dict[str, Any]]) -> Trace:
    """Loads and prefetches are the copies; the computation is what operations ran outside of them."""
    marks = sorted(e["ts"] for e in events if e["name"] == "mark")
    ops = [e for e in events if e.get("cat") == "cpu_op" and e["name"].startswith(("aten::", "squareq::"))]
    ops.sort(key=lambda e: (e["ts"], -e["dur"]))
    copies, compute, over = [], [], 0.0
    for event in ops:
        if event["ts"] < over:  # inside another
            continue
        over = event["ts"] + event["dur"]
        if event["name"] in ("squareq::load", "squareq::prefetch"):
            copies.append(event)
        else:
            compute.append((_kernel_kind(event["name"]), event))
    return _trace(compute, copies, marks)


def _trace(compute: Iterable[tuple[str, dict[str, Any]]], copies: Iterable[dict[str, Any]], marks: list[float]) -> Trace:
    zero, backward = marks

    def spans(pairs: Iterable[tuple[str, dict[str, Any]]]) -> tuple[Span, ...]:
        found: list[Span] = []
        for kind, event in sorted(pairs, key=lambda pair: pair[1]["ts"]):
            start, end = ((event["ts"] + extra - zero) / 1e3 for extra in (0, event["dur"]))
            if found and found[-1].kind == kind and start - found[-1].end < _JOIN_US / 1e3:
                found[-1] = Span(kind, found[-1].start, max(end, found[-1].end))
            else:
                found.append(Span(kind, start, end))
        return tuple(found)

    lanes = spans(compute), spans(("host to device", e) for e in copies)
    return Trace(*lanes, (backward - zero) / 1e3, max(span.end for lane in lanes for span in lane))


def _kernel_kind(name: str) -> str:
    name = name.lower()
    if any(part in name for part in ("flash", "fmha", "attention", "sdpa")):
        return "attention"
    if "dequant" in name:
        return "dequantise"
    if any(part in name for part in _PRODUCTS):
        return "matrix product"
    return "other kernels"


def _union(spans: Iterable[Span]) -> list[tuple[float, float]]:
    merged: list[tuple[float, float]] = []
    for span in sorted(spans, key=lambda s: s.start):
        if merged and span.start <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(merged[-1][1], span.end)
        else:
            merged.append((span.start, span.end))
    return merged


def draw(trace: Trace, title: str, path: Path) -> None:
    """The whole step, and the time around the beginning of the backward, as a picture."""
    with mpl.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(13, 5.2), layout="constrained")
        whole, near = figure.subplots(2, 1)
        figures = trace.figures()
        share = figures["copy_under_compute_ms"] / figures["copy_ms"] if figures["copy_ms"] else 0.0
        _lanes(whole, trace, 0.0, trace.end)
        whole.set_title(
            f"{title}: {trace.end:.0f} ms; copies {figures['copy_ms']:.0f} ms, {share:.0%} of it under compute", loc="left"
        )
        reach = trace.end * _ZOOM
        _lanes(near, trace, max(0.0, trace.backward - reach), min(trace.end, trace.backward + reach))
        near.set_title("where the backward begins", loc="left")
        near.set_xlabel("ms since the forward began")
        handles = [Patch(color=colour, label=kind) for kind, colour in COLOURS.items()]
        figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=130)


def _lanes(axes: Axes, trace: Trace, start: float, end: float) -> None:
    axes.axvspan(start, trace.backward, color="#f3f6fa", zorder=0)
    axes.axvline(trace.backward, color="#1f2933", linewidth=1)
    for y, spans in ((1, trace.compute), (0, trace.copy)):
        for kind, colour in COLOURS.items():
            bars = [(s.start, s.end - s.start) for s in spans if s.kind == kind and s.end > start and s.start < end]
            axes.broken_barh(bars, (y - 0.35, 0.7), facecolors=colour, linewidth=0)
    for text, x, side in (("forward ", trace.backward, "right"), (" backward", trace.backward, "left")):
        axes.text(x, 1.45, text, ha=side, va="bottom")
    axes.set(xlim=(start, end), ylim=(-0.5, 1.75), yticks=[0, 1], yticklabels=["copy stream", "compute stream"])
