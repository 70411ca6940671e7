"""How the report's figures look: colours, matplotlib's settings, and the way to SVG text."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import matplotlib as mpl
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from squareq_fx.demo.sampling import CLASSES, SIZE, to_grid

__all__ = ["BLUE", "FAINT", "GREEN", "INK", "MUTED", "ORANGE", "VIOLET", "frame_grid", "show_grid", "styled", "to_svg"]

INK, MUTED, FAINT = "#1f2933", "#616e7c", "#e4e7eb"
BLUE, ORANGE, GREEN, VIOLET = "#2563eb", "#ea8a1f", "#0f9d76", "#7c4dbd"
_STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": MUTED,
    "axes.titlecolor": INK,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": FAINT,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "legend.frameon": False,
    "svg.fonttype": "none",  # text stays text, and the page's own font applies to it
    "svg.hashsalt": "squareq_fx",  # the same data gives the same file
}


@contextmanager
def styled(width: float, height: float) -> Iterator[Figure]:
    """An empty figure of so many inches; the settings hold until the block ends, `to_svg` included."""
    with mpl.rc_context(_STYLE):
        yield Figure(figsize=(width, height), layout="constrained")


def show_grid(axes: Axes, samples: torch.Tensor, *, labelled: bool) -> None:
    """Samples `[10 * columns, 1, 8, 8]` in [0, 1], a row for each class, whose number stands before it if `labelled`."""
    axes.imshow(to_grid(samples).numpy(), cmap="gray_r", vmin=0, vmax=1, interpolation="nearest")
    frame_grid(axes, labelled=labelled)


def frame_grid(axes: Axes, *, labelled: bool) -> None:
    """Ticks for the rows of `to_grid`, and no other frame."""
    rows = range(SIZE // 2, CLASSES * (SIZE + 1), SIZE + 1)
    axes.set(xticks=[], yticks=rows, yticklabels=range(CLASSES) if labelled else [])
    axes.tick_params(length=0)
    axes.grid(False)
    axes.spines[:].set_visible(False)
    if labelled:
        axes.set_ylabel("class asked for")


def to_svg(figure: Figure) -> str:
    """The figure as SVG text that can stand inside a page."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None}, dpi=200)
    text = buffer.getvalue()
    return text[text.index("<svg") :]  # without the XML prologue, whose doctype names an outside address
