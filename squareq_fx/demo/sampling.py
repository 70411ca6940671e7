"""Draws digits from a flow-matching model: ten classes, several columns, the same noise for the same seed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

__all__ = [
    "CLASSES",
    "NULL_CLASS",
    "SIZE",
    "STEPS",
    "TIMESTEPS",
    "Denoiser",
    "grid_labels",
    "sample_digits",
    "to_grid",
]

CLASSES = 10
NULL_CLASS = CLASSES  # the class label that means "no class": the unconditional half of guidance
SIZE = 8
STEPS = 20
TIMESTEPS = 1000  # timestep 1000 is pure noise, 0 is the picture

Denoiser = Callable[..., Any]


def grid_labels(columns: int) -> torch.Tensor:
    """Class of every sample of a grid: `[10 * columns]` int64, row by row, `columns` of each digit."""
    return torch.arange(CLASSES).repeat_interleave(columns)


@torch.no_grad()
def sample_digits(
    denoiser: Denoiser,
    *,
    columns: int = 8,
    steps: int = STEPS,
    guidance: float = 1.5,
    seed: int = 0,
    on_step: Callable[[int], None] | None = None,
) -> torch.Tensor:
    """Integrates dx/dt = v(x, t, class) from noise at t = 1 to pictures at t = 0 with Heun's method.

    The model was trained on x_t = (1 - t) * picture + t * noise and predicts v = noise - picture. With
    guidance w the velocity is v_null + w * (v_class - v_null); both halves are one batch of the model.

    Args:
        denoiser: called as `denoiser(hidden_states, timestep=..., class_labels=..., return_dict=False)`;
            returns a tuple whose first entry has the shape of `hidden_states`. The float model, the compiled
            one, any other.
        columns: samples per digit.
        steps: Heun steps, each of two model calls but for the last, which needs one; must divide 1000.
        guidance: weight w; 1 is the plain conditional model.
        seed: of the noise, drawn on the CPU, so that two models start from the same pictures.
        on_step: called after each step with the number of steps done.

    Returns:
        `[10 * columns, 1, 8, 8]` float32 in [0, 1], ordered as `grid_labels(columns)`.

    Raises:
        ValueError: `steps` does not divide 1000, or `columns` is not positive.

    Source: flow matching, arXiv 2210.02747; classifier-free guidance, 2207.12598; Heun's method, 2206.00364.
    """
    if columns < 1 or steps < 1 or TIMESTEPS % steps:
        raise ValueError(f"columns must be positive and steps divide {TIMESTEPS}; got {columns=}, {steps=}")
    labels = grid_labels(columns)
    both = torch.cat([labels, torch.full_like(labels, NULL_CLASS)])
    x = torch.randn(len(labels), 1, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))

    def velocity(x: torch.Tensor, timestep: int) -> torch.Tensor:
        t = torch.full((len(both),), timestep, dtype=torch.int64)
        v = denoiser(torch.cat([x, x]), timestep=t, class_labels=both, return_dict=False)[0].float()
        with_class, without = v.chunk(2)
        return without + guidance * (with_class - without)

    stride = TIMESTEPS // steps
    dt = stride / TIMESTEPS
    for done, now in enumerate(range(TIMESTEPS, 0, -stride), start=1):
        slope = velocity(x, now)
        if now > stride:
            slope = (slope + velocity(x - dt * slope, now - stride)) / 2
        x = x - dt * slope
        if on_step is not None:
            on_step(done)
    return ((x + 1) / 2).clamp(0, 1)


def to_grid(samples: torch.Tensor) -> torch.Tensor:
    """`[10 * columns, 1, 8, 8]` -> one picture `[91, columns * 9 + 1]`, a row a digit, zeros between."""
    columns = len(samples) // CLASSES
    cells = torch.nn.functional.pad(samples.reshape(CLASSES, columns, SIZE, SIZE), (1, 0, 1, 0))
    rows = cells.permute(0, 2, 1, 3).reshape(CLASSES * (SIZE + 1), columns * (SIZE + 1))
    return torch.nn.functional.pad(rows, (0, 1, 0, 1))
