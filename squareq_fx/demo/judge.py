"""Which digit a picture shows, by a support vector machine fitted to scikit-learn's own digits."""

from __future__ import annotations

from collections.abc import Callable

import torch

from squareq_fx.demo.pictures import Pictures, has_real_digits, real_digits

__all__ = ["Judge", "agreement", "fit_judge", "judge_available", "recognise"]

Judge = Callable[[torch.Tensor], torch.Tensor]

_LEVELS = 16  # of grey, as in the data set


def judge_available() -> bool:
    """Whether scikit-learn is installed; it is optional."""
    return has_real_digits()


def fit_judge(pictures: Pictures) -> Judge:
    """A classifier of `[n, 1, 8, 8]` pictures in [0, 1], fitted to these; it returns `[n]` int64 classes.

    Raises:
        ImportError: scikit-learn is not installed.
    """
    from sklearn.svm import SVC

    def pixels(images: torch.Tensor) -> torch.Tensor:
        return (images.float().clamp(0, 1) * _LEVELS).round().reshape(len(images), -1)

    machine = SVC(gamma=0.001).fit(pixels(pictures.images).numpy(), pictures.labels.numpy())
    return lambda images: torch.from_numpy(machine.predict(pixels(images).numpy())).long()


def recognise(samples: torch.Tensor) -> torch.Tensor:
    """`[n, 1, 8, 8]` pictures in [0, 1] -> `[n]` int64, the digit each one shows.

    Raises:
        ImportError: scikit-learn is not installed.
    """
    return fit_judge(real_digits())(samples)


def agreement(samples: torch.Tensor, labels: torch.Tensor, judge: Judge = recognise) -> float:
    """Share of samples that are recognised as the digit they were drawn as, 0 to 1."""
    return (judge(samples) == labels).float().mean().item()
