"""Pictures of digits to learn from: scikit-learn's where it is installed, else what the float model draws."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass

import torch

from squareq_fx.demo.sampling import CLASSES, SIZE, Denoiser, grid_labels, sample_digits

__all__ = ["Pictures", "Split", "drawn_digits", "has_real_digits", "real_digits", "split"]

_LEVELS = 16  # the data set's pixels are whole numbers from 0 to 16


@dataclass(frozen=True)
class Pictures:
    """`images` `[n, 1, 8, 8]` float32 in [0, 1], `labels` `[n]` int64."""

    images: torch.Tensor
    labels: torch.Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: torch.Tensor) -> Pictures:
        return Pictures(self.images[index], self.labels[index])


@dataclass(frozen=True)
class Split:
    """Pictures to train on, and pictures held out, of each class as many and in the order of the classes."""

    training: Pictures
    held_out: Pictures


def has_real_digits() -> bool:
    """Whether scikit-learn is installed; it is optional."""
    return importlib.util.find_spec("sklearn") is not None


def real_digits() -> Pictures:
    """scikit-learn's 1797 handwritten digits.

    Raises:
        ImportError: scikit-learn is not installed.

    Source: Alpaydin and Kaynak, Optical Recognition of Handwritten Digits, UCI machine learning repository.
    """
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.from_numpy(digits.data).float().reshape(-1, 1, SIZE, SIZE) / _LEVELS
    return Pictures(images, torch.from_numpy(digits.target).long())


def drawn_digits(denoiser: Denoiser, columns: int = 24, seed: int = 1000) -> Pictures:
    """`columns` pictures of each class, drawn by a model in few steps."""
    return Pictures(sample_digits(denoiser, columns=columns, steps=10, seed=seed), grid_labels(columns))


def split(pictures: Pictures, held_out: int, seed: int) -> Split:
    """Holds out so many pictures of each class, chosen at random by the seed.

    Raises:
        ValueError: a class has no more than that.
    """
    order = torch.randperm(len(pictures), generator=torch.Generator().manual_seed(seed))
    chosen = []
    for digit in range(CLASSES):
        of_class = order[pictures.labels[order] == digit]
        if len(of_class) <= held_out:
            raise ValueError(f"{held_out} pictures of each class are to be held out, but there are {len(of_class)} of {digit}")
        chosen.append(of_class[:held_out])
    kept = torch.cat(chosen)
    others = torch.ones(len(pictures), dtype=torch.bool)
    others[kept] = False
    return Split(pictures[others.nonzero().flatten()], pictures[kept])
