"""The style the demo teaches, the digits it teaches with, and the judges."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from squareq_fx.demo.judge import agreement, fit_judge
from squareq_fx.demo.pictures import Pictures, drawn_digits, real_digits, split
from squareq_fx.demo.style import SHEAR, italic, slant

SHEARS = st.floats(-1, 1)


def disc(size: int, width: float) -> torch.Tensor:
    """A round blob in the middle, which leans nowhere: `[1, 1, size, size]` float64."""
    at = torch.arange(size, dtype=torch.float64) - (size - 1) / 2
    line = torch.exp(-((at / width) ** 2) / 2)
    return torch.outer(line, line)[None, None]


@given(shear=SHEARS)
def test_the_slant_of_a_sheared_blob_is_the_angle_of_the_shear(shear: float) -> None:
    leaning = italic(disc(33, 2.5), shear)
    assert slant(leaning) == pytest.approx(math.degrees(math.atan(shear)), abs=0.2)
    assert leaning.sum().item() == pytest.approx(disc(33, 2.5).sum().item(), rel=1e-3)  # no ink comes or goes


@given(shear=SHEARS, right=st.integers(-4, 4), up=st.integers(-4, 4), darkness=st.floats(0.1, 10))
def test_slant_is_that_of_the_ink_wherever_it_is_and_turns_in_a_mirror(
    shear: float, right: int, up: int, darkness: float
) -> None:
    leaning = italic(disc(33, 2.0), shear)
    assert slant(darkness * leaning.roll((up, right), (2, 3))) == pytest.approx(slant(leaning), abs=0.05)
    assert slant(leaning.flip(3)) == pytest.approx(-slant(leaning), abs=1e-6)


def test_edges_of_slant_and_italic() -> None:
    assert slant(torch.zeros(3, 1, 8, 8)) == 0
    pictures = torch.rand(5, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(italic(pictures, 0.0), pictures)
    above = torch.zeros(1, 1, 8, 8)
    above[..., 0, 3] = 1
    assert italic(above, SHEAR)[0, 0, 0].nonzero().min() > 3  # the top goes to the right
    assert italic(pictures).shape == pictures.shape and italic(pictures).dtype == pictures.dtype


@given(
    labels=st.lists(st.integers(0, 9), max_size=40).map(lambda more: [*range(10), *range(10), *more]),
    held_out=st.integers(1, 3),
    seed=st.integers(0, 2**31),
)
def test_a_split_loses_nothing_and_holds_out_as_many_of_each_class(labels: list[int], held_out: int, seed: int) -> None:
    classes = torch.tensor(labels)
    pictures = Pictures(torch.arange(float(len(labels))).view(-1, 1, 1, 1), classes)
    if classes.bincount().min() <= held_out:
        with pytest.raises(ValueError, match="of each class are to be held out"):
            split(pictures, held_out, seed)
        return
    parts = split(pictures, held_out, seed)
    assert parts.held_out.labels.tolist() == torch.arange(10).repeat_interleave(held_out).tolist()
    for part in (parts.training, parts.held_out):
        assert torch.equal(classes[part.images.flatten().long()], part.labels)
    seen = torch.cat([parts.training.images, parts.held_out.images]).flatten().sort().values
    assert torch.equal(seen, pictures.images.flatten())
    again = split(pictures, held_out, seed)
    assert torch.equal(again.held_out.images, parts.held_out.images)


def test_real_digits_become_italic_and_a_judge_of_either_kind_knows_its_own() -> None:
    pytest.importorskip("sklearn")
    digits = real_digits()
    assert digits.images.shape == (1797, 1, 8, 8) and digits.images.min() == 0 and digits.images.max() == 1
    leaning = Pictures(italic(digits.images), digits.labels)
    assert slant(leaning.images) - slant(digits.images) == pytest.approx(math.degrees(math.atan(SHEAR)), abs=2)
    parts = [split(pictures, 8, seed=0) for pictures in (digits, leaning)]
    read = [
        [agreement(part.held_out.images, part.held_out.labels, fit_judge(judged.training)) for part in parts]
        for judged in parts
    ]
    assert read[0][0] > 0.95 and read[1][1] > 0.95  # each the digits it was fitted to
    assert read[0][1] < 0.7 and read[1][0] < 0.7  # and not the others: the style is more than a nuance


def test_drawn_digits_are_as_many_of_each_class() -> None:
    def denoiser(hidden_states: torch.Tensor, **_: torch.Tensor) -> tuple[torch.Tensor]:
        return (torch.zeros_like(hidden_states),)

    drawn = drawn_digits(denoiser, columns=3)
    assert drawn.images.shape == (30, 1, 8, 8) and drawn.labels.bincount().tolist() == [3] * 10
