"""The report's figures, from plain data to SVG text. They draw and know nothing of models or slabs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from matplotlib.axes import Axes
from matplotlib.patches import Patch
from matplotlib.ticker import PercentFormatter

from squareq_fx.demo.drawing import BLUE, GREEN, INK, MUTED, ORANGE, VIOLET, frame_grid, show_grid, styled, to_svg
from squareq_fx.demo.sampling import to_grid
from squareq_fx.demo.timeline import Timeline

__all__ = [
    "LayerFidelity",
    "digits_figure",
    "fidelity_figure",
    "stages_figure",
    "timeline_figure",
]


@dataclass(frozen=True)
class LayerFidelity:
    """How close one layer's INT8 weight is to its float weight: both figures over all its entries."""

    name: str
    group: str
    cosine: float
    relative_l2: float


def digits_figure(float_samples: torch.Tensor, int8_samples: torch.Tensor) -> str:
    """Both grids and their difference. Samples `[10 * columns, 1, 8, 8]` in [0, 1] -> SVG."""
    difference = to_grid(int8_samples - float_samples).numpy()
    reach = max(abs(difference).max(), 1e-6)
    drawn_by = (("Float", float_samples), ("INT8, streamed", int8_samples))
    with styled(11.5, 4.45) as figure:
        left, middle, right = figure.subplots(1, 3)
        for axes, (title, samples) in zip((left, middle), drawn_by):
            show_grid(axes, samples, labelled=axes is left)
            axes.set_title(title)
        drawn = right.imshow(difference, cmap="RdBu_r", vmin=-reach, vmax=reach, interpolation="nearest")
        frame_grid(right, labelled=False)
        right.set_title("Difference, INT8 minus float")
        figure.colorbar(drawn, ax=right, label="difference in pixel value", shrink=0.85)
        return to_svg(figure)


def timeline_figure(timeline: Timeline, parts: Sequence[str] = ()) -> str:
    """Arena bytes in use over one step; below, which block held which bytes from load to evict. -> SVG

    Args:
        parts: names of the timeline's steps, if it has several.
    """
    with styled(11.5, 5.2) as figure:
        top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(1, 1.4))
        times, held = zip((0.0, 0), *timeline.in_use, (timeline.step_ms, timeline.in_use[-1][1]))
        kib = [value / 1024 for value in held]
        arena = timeline.arena_bytes / 1024
        top.fill_between(times, kib, step="post", color=BLUE, alpha=0.22, linewidth=0)
        top.step(times, kib, where="post", color=BLUE, linewidth=1.4, label="in use")
        top.axhline(arena, color=INK, linewidth=1, linestyle=(0, (4, 3)), label="arena")
        top.set(ylim=(0, arena * (1.36 if parts else 1.18)), ylabel="KiB", title="Weight bytes held in the arena")
        top.legend(loc="upper right", ncols=2, bbox_to_anchor=(1, 1.22))
        for start, name in zip(timeline.starts, parts):
            top.annotate(name, (start, 0.97), (6, 0), top.get_xaxis_transform(), "offset points", va="top", color=MUTED)
            top.axvline(start, color=MUTED, linewidth=1)
            bottom.axvline(start, color=MUTED, linewidth=1, zorder=0)  # behind the blocks and their names
        _draw_stays(bottom, timeline)
        bottom.set(
            xlim=(0, times[-1]),
            ylim=(arena, 0),
            xlabel="milliseconds since the step began",
            ylabel="arena offset, KiB",
            title="Which block holds which bytes, from prefetch over load to evict",
        )
        return to_svg(figure)


def _draw_stays(axes: Axes, timeline: Timeline) -> None:
    names = list(dict.fromkeys(stay.name for stay in timeline.stays))
    colours = {name: (BLUE, GREEN, ORANGE, VIOLET)[index % 4] for index, name in enumerate(names)}
    for stay in timeline.stays:
        colour = colours[stay.name]
        rows = (stay.offset / 1024, stay.nbytes / 1024)
        loaded = stay.evicted if stay.loaded is None else stay.loaded
        ahead, used = (stay.claimed, loaded - stay.claimed), (loaded, stay.evicted - loaded)
        axes.broken_barh([ahead], rows, color=colour, alpha=0.25, linewidth=0)
        axes.broken_barh([used], rows, color=colour, alpha=0.55, linewidth=0)
        width = (stay.evicted - stay.claimed) / (0.008 * timeline.step_ms)  # in characters
        label = next((text for text in (stay.name, stay.name.rpartition("_")[2]) if len(text) < width), "")
        axes.text((stay.claimed + stay.evicted) / 2, rows[0] + rows[1] / 2, label, ha="center", va="center", fontsize=8)
    handles = [
        Patch(facecolor=MUTED, alpha=0.25, label="prefetched"),
        Patch(facecolor=MUTED, alpha=0.55, label="loaded"),
    ]
    axes.legend(handles=handles, loc="upper right", ncols=2, bbox_to_anchor=(1, 1.17))


def fidelity_figure(layers: Sequence[LayerFidelity]) -> str:
    """Relative L2 error and cosine of every layer's weight, in execution order, blocks shaded. -> SVG"""
    with styled(11.5, 4.6) as figure:
        top, bottom = figure.subplots(2, 1, sharex=True)
        positions = range(len(layers))
        for axes in (top, bottom):
            _shade_groups(axes, [layer.group for layer in layers])
        top.vlines(positions, 0, [layer.relative_l2 for layer in layers], color=BLUE, linewidth=1, alpha=0.5)
        top.plot(positions, [layer.relative_l2 for layer in layers], "o", color=BLUE, markersize=4)
        top.yaxis.set_major_formatter(PercentFormatter(1, decimals=2))
        top.set(
            ylim=(0, 1.25 * max(layer.relative_l2 for layer in layers)),
            ylabel="‖error‖ / ‖weight‖",
            title="Relative L2 error of each INT8 weight",
        )
        bottom.plot(positions, [1 - layer.cosine for layer in layers], "o", color=ORANGE, markersize=4)
        bottom.set(
            ylim=(0, 1.25 * max(1 - layer.cosine for layer in layers)),
            ylabel="1 - cosine",
            xlabel="layer, in execution order",
            title="Distance of each INT8 weight's direction from the float weight's (smaller is better)",
            xlim=(-0.6, len(layers) - 0.4),
        )
        for axes in (top, bottom):
            axes.grid(False, axis="x")
        return to_svg(figure)


def _shade_groups(axes: Axes, groups: Sequence[str]) -> None:
    first = 0
    for end in range(1, len(groups) + 1):
        if end < len(groups) and groups[end] == groups[first]:
            continue
        if groups[first]:
            axes.axvspan(first - 0.5, end - 0.5, color="#f3f6fa", linewidth=0, zorder=0)
            axes.axvline(end - 0.5, color="white", linewidth=2, zorder=0)
            axes.annotate(
                groups[first],
                xy=((first + end - 1) / 2, 0.96),
                xycoords=axes.get_xaxis_transform(),
                ha="center",
                va="top",
                fontsize=8,
                color=MUTED,
            )
        first = end


def stages_figure(stages: Sequence[tuple[str, float]]) -> str:
    """Seconds of each stage of the demonstration as one horizontal bar a stage. -> SVG"""
    with styled(11.5, 0.38 * len(stages) + 0.9) as figure:
        axes = figure.subplots()
        names, seconds = zip(*stages)
        bars = axes.barh(names, seconds, color=BLUE, alpha=0.75, height=0.62)
        axes.bar_label(bars, fmt="%.1f s", padding=4, color=INK)
        axes.invert_yaxis()
        axes.set(xlabel="seconds", xlim=(0, max(seconds) * 1.1), title="Time of each stage")
        axes.grid(False, axis="y")
        axes.tick_params(axis="y", length=0, labelcolor=INK)
        return to_svg(figure)
