"""The style that the demonstration teaches: digits made italic, and how italic a picture is."""

from __future__ import annotations

import math

import torch

__all__ = ["SHEAR", "italic", "slant"]

SHEAR = 0.5
"""Columns to the right for each row up: 26.6 degrees."""


def italic(pictures: torch.Tensor, shear: float = SHEAR) -> torch.Tensor:
    """Every row shifted in proportion to its height above the middle; what leaves the picture is lost.

    Args:
        pictures: `[n, 1, height, width]`, square, floating point; outside them all is zero.
        shear: columns to the right for each row up, interpolated linearly.

    Returns:
        Pictures of the same shape and dtype.
    """
    source = torch.tensor([[1.0, shear, 0.0], [0.0, 1.0, 0.0]], dtype=pictures.dtype)  # row coordinates grow downwards
    grid = torch.nn.functional.affine_grid(source.expand(len(pictures), 2, 3), list(pictures.shape), align_corners=False)
    return torch.nn.functional.grid_sample(pictures, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def slant(pictures: torch.Tensor) -> float:
    """Degrees by which the ink leans to the right of vertical, over all pictures together; 0 where there is no ink.

    The angle of the line of columns on rows: covariance of column and height over the variance of height, weighted by ink.

    Args:
        pictures: `[n, 1, height, width]`, ink positive.

    Source: de-slanting by second moments, as in LeCun et al. 1998, "Gradient-based learning applied to document recognition".
    """
    ink = pictures.double().squeeze(1)
    mass = ink.sum((1, 2), keepdim=True).clamp_min(1e-12)
    rows, columns = torch.meshgrid(*(torch.arange(float(n), dtype=ink.dtype) for n in ink.shape[1:]), indexing="ij")
    right = columns - (ink * columns).sum((1, 2), keepdim=True) / mass
    up = (ink * rows).sum((1, 2), keepdim=True) / mass - rows
    return math.degrees(math.atan2((ink * right * up).sum().item(), (ink * up * up).sum().item()))
