"""What the fine-tuning gave, as plain data for the report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from squareq_fx.demo.finetune import Curve, Recipe
from squareq_fx.demo.timeline import Timeline

__all__ = ["BaseCheck", "FineTuning", "SizeRow", "StyleRow"]


@dataclass(frozen=True)
class SizeRow:
    """One line of a table of sizes."""

    what: str
    nbytes: int
    note: str


@dataclass(frozen=True)
class StyleRow:
    """A set of digits: degrees of slant, share read right by judges of upright and of italic digits, None without judges."""

    what: str
    slant: float
    upright: float | None
    italic: float | None


@dataclass(frozen=True)
class BaseCheck:
    """Whether training has left the base model as it was, and whether the file has the whole adapter.

    Attributes:
        slab_before, slab_after: SHA-256 of the slab file.
        pixels: pixel values drawn with the adapter off.
        changed: how many of them differ from those drawn before training, by a module without adapters.
        reloaded: largest difference of one model call between the trained adapter and the one read from its file.
    """

    slab_before: str
    slab_after: str
    pixels: int
    changed: int
    reloaded: float

    @property
    def is_unchanged(self) -> bool:
        return self.slab_before == self.slab_after and not self.changed


@dataclass(frozen=True)
class FineTuning:
    """All that the page shows of the fine-tuning. Samples are `[80, 1, 8, 8]` in [0, 1], a row of eight a class.

    Attributes:
        source: where the digits to learn from came from.
        targets: italic digits nobody trained on.
        before, after: from the same noise, adapter off and on.
        peft_after: from the same noise, PEFT on the float model; None if PEFT is not installed.
        upright_loss: the float model's loss on the held-out digits before they are made italic.
        layers, parameters: how many are adapted, and trained.
        timeline: the last training step, forward and backward.
        adapter: the file that was written and read.
    """

    recipe: Recipe
    source: str
    targets: torch.Tensor
    before: torch.Tensor
    after: torch.Tensor
    peft_after: torch.Tensor | None
    curve: Curve
    peft_curve: Curve | None
    upright_loss: float
    layers: int
    parameters: int
    rows: Sequence[StyleRow]
    base: BaseCheck
    sizes: Sequence[SizeRow]
    timeline: Timeline
    adapter: Path
