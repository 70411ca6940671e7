"""Fine-tuning a flow-matching model of digits on given batches: the same loop for the compiled module and for PEFT's."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch

from squareq_fx.demo.pictures import Pictures
from squareq_fx.demo.sampling import NULL_CLASS, TIMESTEPS, Denoiser

__all__ = ["Batch", "Curve", "Recipe", "evaluate", "flow_matching_loss", "make_batch", "make_batches", "predict", "train"]

_LABEL_DROP = 0.1


@dataclass(frozen=True)
class Recipe:
    """How to fine-tune. `targets` is that of `squareq_fx.Lora`, `lr` the highest learning rate of AdamW."""

    steps: int = 120
    batch: int = 48
    lr: float = 6e-3
    warmup: int = 10
    rank: int = 8
    targets: str = "attention+ff"
    seed: int = 0
    evaluate_every: int = 10


@dataclass(frozen=True)
class Batch:
    """Pictures `[n, 1, 8, 8]` in [-1, 1], normal noise of that shape, timesteps 1 to 1000 and classes, `[n]` int64."""

    pictures: torch.Tensor
    noise: torch.Tensor
    timestep: torch.Tensor
    labels: torch.Tensor


@dataclass(frozen=True)
class Curve:
    """How a training went.

    Attributes:
        training: loss of each step's batch, before the step.
        held_out: (steps done, loss on the held-out batch).
        step_seconds: median time of a step, evaluations not counted.
    """

    training: tuple[float, ...]
    held_out: tuple[tuple[int, float], ...]
    step_seconds: float

    @property
    def start(self) -> float:
        return self.held_out[0][1]

    @property
    def end(self) -> float:
        return self.held_out[-1][1]


def make_batch(pictures: Pictures, generator: torch.Generator, label_drop: float = 0.0) -> Batch:
    """Noise, a time and a class for each of these pictures, which are in [0, 1]."""
    count = len(pictures)
    timestep = torch.randint(1, TIMESTEPS + 1, (count,), generator=generator)
    noise = torch.randn(pictures.images.shape, generator=generator)
    dropped = torch.rand(count, generator=generator) < label_drop
    return Batch(2 * pictures.images - 1, noise, timestep, torch.where(dropped, NULL_CLASS, pictures.labels))


def make_batches(pictures: Pictures, recipe: Recipe) -> list[Batch]:
    """What the steps train on; the same for the same seed, fewer steps or more. One label in ten is dropped, for guidance."""
    generator = torch.Generator().manual_seed(recipe.seed)

    def pick() -> Pictures:
        return pictures[torch.randint(len(pictures), (recipe.batch,), generator=generator)]

    return [make_batch(pick(), generator, _LABEL_DROP) for _ in range(recipe.steps)]


def predict(denoiser: Denoiser, batch: Batch) -> torch.Tensor:
    """The velocity at the batch's noisy pictures, `[n, 1, 8, 8]`: they lie on the straight path from picture to noise."""
    t = (batch.timestep / TIMESTEPS).view(-1, 1, 1, 1)
    noisy = (1 - t) * batch.pictures + t * batch.noise
    return denoiser(noisy, timestep=batch.timestep, class_labels=batch.labels, return_dict=False)[0]


def flow_matching_loss(denoiser: Denoiser, batch: Batch) -> torch.Tensor:
    """Mean square error of the predicted velocity against noise - picture.

    Source: flow matching, arXiv 2210.02747.
    """
    return torch.nn.functional.mse_loss(predict(denoiser, batch), batch.noise - batch.pictures)


@torch.no_grad()
def evaluate(denoiser: Denoiser, batch: Batch) -> float:
    """The loss on a batch, without gradients."""
    return flow_matching_loss(denoiser, batch).item()


def train(
    denoiser: Denoiser,
    parameters: Iterable[torch.nn.Parameter],
    batches: Sequence[Batch],
    held_out: Batch,
    recipe: Recipe,
    on_step: Callable[[int, float], None] | None = None,
) -> Curve:
    """AdamW over the batches, one step each, its rate rising for `recipe.warmup` steps and then falling to zero as a cosine.

    Args:
        parameters: what is trained, in place.
        on_step: called after each step with the number of steps done and the batch's loss.
    """
    optimizer = torch.optim.AdamW(parameters, lr=recipe.lr, weight_decay=0.0)
    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, len(batches), recipe.warmup))
    losses, seconds = [], []
    evaluations = [(0, evaluate(denoiser, held_out))]
    for done, batch in enumerate(batches, start=1):
        began = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        loss = flow_matching_loss(denoiser, batch)
        loss.backward()
        optimizer.step()
        rate.step()
        losses.append(loss.item())
        seconds.append(time.perf_counter() - began)
        if done % recipe.evaluate_every == 0 or done == len(batches):
            evaluations.append((done, evaluate(denoiser, held_out)))
        if on_step is not None:
            on_step(done, losses[-1])
    return Curve(tuple(losses), tuple(evaluations), sorted(seconds)[len(seconds) // 2])


def _rate(step: int, steps: int, warmup: int) -> float:
    """Factor of the learning rate at a step, counted from 0."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))
