"""Aspect-ratio buckets: an image is trained at the resolution nearest to its shape, and a batch has one resolution.

Source: NovelAI, "Novelai improvements on Stable Diffusion" (2022), aspect ratio bucketing. Sizes are (width, height) in pixels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from squareq_fx.errors import SquareQError

__all__ = ["Crop", "Size", "crop_to", "make_buckets", "nearest_bucket"]

Size = tuple[int, int]


@dataclass(frozen=True)
class Crop:
    """Resize an image to `resized`, then cut out the bucket's size from `left`, `top` on."""

    resized: Size
    left: int
    top: int


def make_buckets(resolution: int, step: int = 64, max_aspect: float = 2.0) -> list[Size]:
    """Sizes of about `resolution * resolution` pixels, never more, from tall to wide.

    Args:
        resolution: side of the square bucket; a multiple of `step`.
        step: what both sides are multiples of.
        max_aspect: longer side by shorter side, at most.

    Raises:
        SquareQError: `resolution` is not a positive multiple of `step`, or `max_aspect` is below 1.
    """
    if step < 1 or resolution < step or resolution % step:
        raise SquareQError(f"the resolution must be a multiple of the bucket step, not {resolution} of {step}")
    if max_aspect < 1:
        raise SquareQError(f"the largest aspect ratio is at least 1, not {max_aspect}")
    tall: list[Size] = []
    for width in range(step, resolution + 1, step):
        height = resolution * resolution // width // step * step
        if height <= max_aspect * width:
            tall.append((width, height))
    return sorted({*tall, *((height, width) for width, height in tall)}, key=lambda size: size[0] / size[1])


def nearest_bucket(size: Size, buckets: list[Size]) -> Size:
    """The bucket whose aspect ratio is the nearest, on a logarithmic scale; of two, the one with more pixels."""
    aspect = math.log(size[0] / size[1])
    return min(buckets, key=lambda bucket: (abs(math.log(bucket[0] / bucket[1]) - aspect), -bucket[0] * bucket[1]))


def crop_to(size: Size, bucket: Size) -> Crop:
    """Scale an image until it just covers the bucket, and cut equally from both ends of what protrudes."""
    (width, height), (to_width, to_height) = size, bucket
    if to_width * height >= to_height * width:
        resized = (to_width, max(to_height, round(height * to_width / width)))
    else:
        resized = (max(to_width, round(width * to_height / height)), to_height)
    return Crop(resized, left=(resized[0] - to_width) // 2, top=(resized[1] - to_height) // 2)
