"""One adapter as plain tensors, whatever file it comes from or goes to."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from squareq_fx.errors import SquareQError

__all__ = ["Adapter", "LayerAdapter"]


@dataclass(frozen=True)
class LayerAdapter:
    """y = base(x) + (alpha / rank) * up @ down @ x

    Args:
        down: A, float32 [r, in]. up: B, float32 [out, r].
        alpha: positive; the scaling is alpha / r.

    Raises:
        SquareQError: the shapes do not go together, or alpha is not positive.
    """

    down: torch.Tensor
    up: torch.Tensor
    alpha: float

    def __post_init__(self) -> None:
        if self.down.dim() != 2 or self.up.dim() != 2 or self.down.shape[0] != self.up.shape[1]:
            raise SquareQError(
                f"an adapter is A [r, in] and B [out, r], not {list(self.down.shape)} and {list(self.up.shape)}"
            )
        if not 0 < self.alpha < math.inf:
            raise SquareQError(f"alpha must be a positive number, not {self.alpha!r}")

    @property
    def rank(self) -> int:
        return int(self.down.shape[0])

    @property
    def scaling(self) -> float:
        return self.alpha / self.rank


@dataclass(frozen=True)
class Adapter:
    """Adapted layers by their module path in the model, `transformer_blocks.0.attn.to_q`."""

    layers: Mapping[str, LayerAdapter]
