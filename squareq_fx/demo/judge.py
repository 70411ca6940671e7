"""Which digit a picture shows, by a support vector machine fitted to scikit-learn's own digits."""

from __future__ import annotations

import importlib.util

import torch

__all__ = ["agreement", "judge_available", "recognise"]

_LEVELS = 16  # the data set's pixels are whole numbers from 0 to 16


def judge_available() -> bool:
    """Whether scikit-learn is installed; it is optional."""
    return importlib.util.find_spec("sklearn") is not None


def recognise(samples: torch.Tensor) -> torch.Tensor:
    """`[n, 1, 8, 8]` pictures in [0, 1] -> `[n]` int64, the digit each one shows.

    Raises:
        ImportError: scikit-learn is not installed.
    """
    from sklearn.datasets import load_digits
    from sklearn.svm import SVC

    digits = load_digits()
    judge = SVC(gamma=0.001).fit(digits.data, digits.target)
    pixels = (samples.float().clamp(0, 1) * _LEVELS).round().reshape(len(samples), -1)
    return torch.from_numpy(judge.predict(pixels.numpy())).long()


def agreement(samples: torch.Tensor, labels: torch.Tensor) -> float:
    """Share of samples that are recognised as the digit they were drawn as, 0 to 1."""
    return (recognise(samples) == labels).float().mean().item()
