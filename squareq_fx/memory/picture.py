"""A forecast as a picture: what is held while each node of the top level runs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from squareq_fx.memory.rehearsal import Visit

__all__ = ["draw_visits"]

_LIGHT, _DARK, _GREY, _RED = "#9db8d6", "#2f5d8c", "#c8c8c8", "#b03a2e"
_GIB, _MIB = 2**30, 2**20


def draw_visits(
    forward: Sequence[Visit],
    backward: Sequence[Visit],
    fixed: Sequence[tuple[str, int]],
    highest: tuple[str, int],
    path: str | os.PathLike[str],
) -> Path:
    """Bytes over the nodes, in the order they run; the suffix of `path` says in which format.

    Args:
        forward, backward: what their nodes hold beyond the fixed.
        fixed: what is held throughout: its names and bytes, drawn from the ground up.
        highest: where the peak is, and how much is held there beyond the fixed.
    """
    from matplotlib.figure import Figure  # a second that only pictures need

    ground = sum(nbytes for _, nbytes in fixed)
    unit, name = (_GIB, "GiB") if ground + highest[1] >= _GIB // 4 else (_MIB, "MiB")
    visits = (*forward, *backward)
    figure = Figure(figsize=(10, 4), layout="constrained")
    axes = figure.add_subplot()
    ticks = [i - 0.5 for i in range(len(visits) + 1)]
    floor = 0.0
    for i, (what, nbytes) in enumerate(fixed):
        top = floor + nbytes / unit
        axes.fill_between([ticks[0], ticks[-1]], floor, top, color=_GREY, alpha=1 - 0.25 * i, label=what, linewidth=0)
        floor = top
    for values, colour, what in (
        ([v.peak for v in visits], _LIGHT, "activations while it runs"),
        ([v.held for v in visits], _DARK, "activations held after it"),
    ):
        axes.stairs([floor + value / unit for value in values], ticks, baseline=floor, fill=True, color=colour, label=what)
    if backward:
        axes.axvline(len(forward) - 0.5, color="black", linestyle=":", linewidth=1)
        axes.annotate("backward", (len(forward), 0), (4, 6), textcoords="offset points")
    at = max(range(len(visits)), key=lambda i: visits[i].peak) if visits else 0
    peak = floor + highest[1] / unit
    axes.annotate(
        f"{peak:.2f} {name}: {highest[0]}",
        (at, peak),
        (0.02, 0.94),
        textcoords="axes fraction",
        va="center",
        color=_RED,
        arrowprops={"arrowstyle": "->", "color": _RED},
    )
    axes.set(xlim=(ticks[0], ticks[-1]), ylim=(0, 1.08 * peak), xlabel="blocks, in the order they run", ylabel=name)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=150)
    return target
