"""What the model is taught: digits made italic, in batches to train on and one to evaluate on."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from squareq_fx.demo.finetune import Batch, Recipe, make_batch, make_batches
from squareq_fx.demo.pictures import Pictures, Split, drawn_digits, has_real_digits, real_digits, split
from squareq_fx.demo.style import italic

__all__ = ["Lesson", "make_lesson"]

_EVALUATION_SEED = 1


@dataclass(frozen=True)
class Lesson:
    """The digits before and after they are made italic, where they came from, and what is trained and evaluated on.

    `held_out` and `upright_held_out` are of the same digits, noise and times.
    """

    plain: Split
    styled: Split
    source: str
    batches: list[Batch]
    held_out: Batch
    upright_held_out: Batch


def make_lesson(model: torch.nn.Module, recipe: Recipe, held_out: int) -> Lesson:
    """scikit-learn's digits where it is installed, else digits the model draws; so many of each class are held out."""
    if has_real_digits():
        digits, source = real_digits(), "scikit-learn's handwritten digits"
    else:
        digits, source = drawn_digits(model), "digits the float model drew (scikit-learn is not installed)"
    plain = split(digits, held_out, recipe.seed)
    styled = Split(_made_italic(plain.training), _made_italic(plain.held_out))
    evaluated, upright = (
        make_batch(part.held_out, torch.Generator().manual_seed(_EVALUATION_SEED)) for part in (styled, plain)
    )
    return Lesson(plain, styled, source, make_batches(styled.training, recipe), evaluated, upright)


def _made_italic(pictures: Pictures) -> Pictures:
    return Pictures(italic(pictures.images), pictures.labels)
