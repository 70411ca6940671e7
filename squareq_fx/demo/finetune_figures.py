"""The report's figures of the fine-tuning, as SVG text."""

from __future__ import annotations

from matplotlib.axes import Axes

from squareq_fx.demo.drawing import BLUE, GREEN, MUTED, ORANGE, show_grid, styled, to_svg
from squareq_fx.demo.finetune import Curve
from squareq_fx.demo.results import FineTuning

__all__ = ["loss_figure", "style_figure"]


def style_figure(tuning: FineTuning) -> str:
    """Digits before and after from the same noise, PEFT's, and what they were to become. -> SVG"""
    grids = {"Adapter off": tuning.before, "Adapter on": tuning.after}
    if tuning.peft_after is not None:
        grids["PEFT, float model"] = tuning.peft_after
    grids["Held-out digits, italic"] = tuning.targets
    with styled(11.5, 3.95) as figure:
        for index, (axes, (title, samples)) in enumerate(zip(figure.subplots(1, len(grids)), grids.items())):
            show_grid(axes, samples, labelled=index == 0)
            axes.set_title(title)
        return to_svg(figure)


def loss_figure(tuning: FineTuning) -> str:
    """Loss by step: ours and PEFT's, on held-out digits and, faintly, on each batch; beside it their difference. -> SVG"""
    ours, peft = tuning.curve, tuning.peft_curve
    with styled(11.5, 3.9) as figure:
        if peft is None:
            left = figure.subplots()
        else:
            left, right = figure.subplots(1, 2, width_ratios=(1.7, 1))
            _draw_difference(right, ours, peft)
        _draw_curve(left, ours, "adapter on streamed INT8", color=BLUE, width=3.2, dashed=False)
        if peft is not None:
            _draw_curve(left, peft, "PEFT on the float model", color=ORANGE, width=1.6, dashed=True)
        upright = "float model on upright digits"
        left.axhline(tuning.upright_loss, color=GREEN, linewidth=1, linestyle=(0, (1, 2)), label=upright)
        left.set(
            xlim=(0, ours.held_out[-1][0]),
            ylim=(0, 1.08 * max(ours.start, ours.training[0])),
            xlabel="step",
            ylabel="flow matching loss",
            title="Loss on italic digits: held out (thick), each batch (thin)",
        )
        left.legend(loc="upper right")
        return to_svg(figure)


def _draw_curve(axes: Axes, curve: Curve, label: str, *, color: str, width: float, dashed: bool) -> None:
    style = (0, (4, 2)) if dashed else "solid"
    axes.plot(range(len(curve.training)), curve.training, color=color, linewidth=0.8, alpha=0.45, linestyle=style)
    axes.plot(*zip(*curve.held_out), color=color, linewidth=width, linestyle=style, label=label)


def _draw_difference(axes: Axes, ours: Curve, peft: Curve) -> None:
    """The training curves are of the same batches, so their difference is the base's and not the luck of the draw."""
    differences = [a - b for a, b in zip(ours.training, peft.training)]
    reach = 1.25 * max(max(map(abs, differences)), 1e-6)
    axes.axhline(0, color=MUTED, linewidth=1)
    axes.plot(range(len(differences)), differences, color=BLUE, linewidth=1)
    held_out = [(step, a - b) for (step, a), (_, b) in zip(ours.held_out, peft.held_out)]
    axes.plot(*zip(*held_out), "o", color=BLUE, markersize=4, clip_on=False)
    axes.set(
        xlim=(0, ours.held_out[-1][0]),
        ylim=(-reach, reach),
        xlabel="step",
        ylabel="difference in loss",
        title="INT8 minus PEFT: batches, held out (dots)",
    )
