"""The demonstration's report: plain data in, one self-contained HTML page out."""

from __future__ import annotations

import io
import os
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from rich.console import Console
from rich.syntax import Syntax

from squareq_fx.demo import figures, finetune_figures
from squareq_fx.demo.figures import LayerFidelity
from squareq_fx.demo.results import FineTuning, SizeRow
from squareq_fx.demo.timeline import Timeline
from squareq_fx.views.units import format_bytes, format_seconds

__all__ = [
    "PassRow",
    "Report",
    "Similarity",
    "highlight",
    "render",
    "write_report",
]


@dataclass(frozen=True)
class Similarity:
    """An INT8 result beside the float one: cosine, ‖difference‖ / ‖float‖, largest single difference."""

    what: str
    cosine: float
    relative_l2: float
    largest: float

    @classmethod
    def of(cls, what: str, ours: torch.Tensor, reference: torch.Tensor) -> Similarity:
        """Compares two tensors of one shape in float64. Raises ValueError if the shapes differ."""
        if ours.shape != reference.shape:
            raise ValueError(f"{what}: shapes differ, {tuple(ours.shape)} and {tuple(reference.shape)}")
        a, b = ours.double().flatten(), reference.double().flatten()
        cosine = torch.nn.functional.cosine_similarity(a, b, dim=0).item()
        return cls(what, cosine, ((a - b).norm() / b.norm()).item(), (a - b).abs().max().item())


@dataclass(frozen=True)
class PassRow:
    """One stage of compilation: nodes at the top level, unique functions, nodes in all, what it did, time."""

    name: str
    top_level: int
    functions: int
    total: int
    summary: str
    seconds: float


@dataclass(frozen=True)
class Report:
    """All that the page shows. SVG and code come as text; samples as `[10 * columns, 1, 8, 8]` in [0, 1]."""

    float_samples: torch.Tensor
    int8_samples: torch.Tensor
    recognised: tuple[float, float] | None  # share of float and of INT8 samples; None without scikit-learn
    similarities: Sequence[Similarity]
    layers: Sequence[LayerFidelity]
    top_level_svg: str
    block_name: str
    block_svg: str
    top_level_code: str
    code: str  # of the top level and all functions
    calls: int
    functions: int
    timeline: Timeline
    tuning: FineTuning
    sizes: Sequence[SizeRow]
    passes: Sequence[PassRow]
    stages: Sequence[tuple[str, float]]
    environment: Sequence[tuple[str, str]]


def render(report: Report) -> str:
    """The page as text. It names no outside address: styles, figures and code are inside."""
    loader = PackageLoader("squareq_fx.demo", package_path="")
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    environment.filters.update(size=format_bytes, seconds=format_seconds)
    tuning = report.tuning
    return environment.get_template("report.html.jinja").render(
        report=report,
        recognised=report.recognised,
        tuning=tuning,
        judged=all(row.upright is not None and row.italic is not None for row in tuning.rows),
        total_seconds=sum(seconds for _, seconds in report.stages),
        digits=Markup(figures.digits_figure(report.float_samples, report.int8_samples)),
        timeline=Markup(figures.timeline_figure(report.timeline)),
        fidelity=Markup(figures.fidelity_figure(report.layers)),
        style=Markup(finetune_figures.style_figure(tuning)),
        losses=Markup(finetune_figures.loss_figure(tuning)),
        training_step=Markup(figures.timeline_figure(tuning.timeline, ("forward", "backward"))),
        stages=Markup(figures.stages_figure(report.stages)),
        top_level=Markup(_inline(report.top_level_svg)),
        block=Markup(_inline(report.block_svg)),
        top_level_code=Markup(highlight(report.top_level_code)),
        code=Markup(highlight(report.code)),
    )


def write_report(report: Report, path: Path) -> Path:
    """Renders into `path` in one step: readers see the old file or the whole new one. Returns the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(render(report))
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
    return path


def highlight(code: str) -> str:
    """Python source as HTML spans with inline colours, to go inside a `<pre>`."""
    lines = code.rstrip("\n").expandtabs(4).splitlines()
    width = max((len(line) for line in lines), default=1) + 1
    console = Console(record=True, width=width, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    console.print(Syntax("\n".join(lines), "python", theme="default", background_color="default"))
    html = console.export_html(inline_styles=True, code_format="{code}")
    html = re.sub(r"background-color: #[0-9a-f]{6}", "", html)  # the page's own shows through
    return re.sub(r"[ ]+$", "", html, flags=re.MULTILINE)


def _inline(svg: str) -> str:
    """An SVG document without what may stand only at the beginning of a file."""
    return svg[svg.index("<svg") :]
