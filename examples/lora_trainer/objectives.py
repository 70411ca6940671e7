"""The training objectives: noise a picture to a random degree, and say what the model should answer.

Random numbers are drawn on the CPU, so that a seed means the same on every device.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from diffusers.training_utils import compute_snr

__all__ = ["Diffusion", "FlowMatching", "Noised", "Objective", "loss_of", "min_snr_weights", "shift_for"]

Prediction = Literal["epsilon", "v_prediction"]


@dataclass(frozen=True)
class Noised:
    """A batch the model is asked about.

    Attributes:
        sample: what the model sees, shaped as the latents.
        timesteps: [batch] float32, from 0 (clean) to 1000 (noise).
        target: what it should answer, shaped as the latents.
        weights: [batch] float32, how much each sample counts.
    """

    sample: torch.Tensor
    timesteps: torch.Tensor
    target: torch.Tensor
    weights: torch.Tensor


class Objective(Protocol):
    """From clean latents [batch, channels, height, width] float32 to what the model is asked about."""

    def noised(self, latents: torch.Tensor) -> Noised:
        """With new random times and noise."""


def loss_of(prediction: torch.Tensor, noised: Noised) -> torch.Tensor:
    """Weighted mean square error, in float32: a scalar."""
    error = (prediction.float() - noised.target).square().flatten(1).mean(1)
    return (noised.weights * error).mean()


@dataclass(frozen=True)
class FlowMatching:
    """Rectified flow (arXiv 2210.02747, 2209.03003): x_t = (1 - t) x + t noise, and the model answers noise - x.

    Args:
        timestep_sampling: t is uniform in [0, 1], or the logistic function of a normal variable, which prefers the middle
            (arXiv 2403.03206, section 3.1).
        mean, std: of that normal variable.
        shift: t -> s t / (1 + (s - 1) t) moves times towards noise (same paper, section 5.3.2); 1 moves nothing, None takes
            Flux's own s, which grows with the resolution.
    """

    timestep_sampling: Literal["uniform", "logit-normal"] = "logit-normal"
    mean: float = 0.0
    std: float = 1.0
    shift: float | None = 1.0

    def times(self, batch: int, tokens: int) -> torch.Tensor:
        """[batch] float32 in [0, 1]; `tokens` is the number of 2x2 patches."""
        if self.timestep_sampling == "uniform":
            t = torch.rand(batch)
        else:
            t = torch.sigmoid(self.mean + self.std * torch.randn(batch))
        s = shift_for(tokens) if self.shift is None else self.shift
        return s * t / (1 + (s - 1) * t)

    def noised(self, latents: torch.Tensor) -> Noised:
        batch, _, height, width = latents.shape
        t = self.times(batch, height * width // 4).to(latents.device)
        noise = torch.randn(latents.shape).to(latents.device)
        mixed = torch.lerp(latents, noise, t.view(-1, 1, 1, 1))
        return Noised(mixed, 1000 * t, noise - latents, torch.ones_like(t))


def shift_for(tokens: int) -> float:
    """The shift with which Flux samples a picture of so many tokens: e^0.5 at 256, e^1.15 at 4096."""
    return float(torch.tensor(calculate_shift(tokens)).exp())


@dataclass(frozen=True)
class Diffusion:
    """Denoising diffusion (arXiv 2006.11239): x_t = a x + s noise; the model answers the noise, or v = a noise - s x
    (arXiv 2202.00512).

    Args:
        scheduler: a diffusers `DDPMScheduler`; its `prediction_type` says which of the two.
        min_snr: gamma of `min_snr_weights`, about 5; None weights all times equally.
    """

    scheduler: Any
    min_snr: float | None = None

    def noised(self, latents: torch.Tensor) -> Noised:
        t = torch.randint(self.scheduler.config["num_train_timesteps"], latents.shape[:1]).to(latents.device)
        noise = torch.randn(latents.shape).to(latents.device)
        predicts_v = self.scheduler.config["prediction_type"] == "v_prediction"
        return Noised(
            sample=self.scheduler.add_noise(latents, noise, t),
            timesteps=t.float(),
            target=self.scheduler.get_velocity(latents, noise, t) if predicts_v else noise,
            weights=self.weights(t),
        )

    def weights(self, timesteps: torch.Tensor) -> torch.Tensor:
        """[batch] float32, of int64 timesteps [batch]."""
        if self.min_snr is None:
            return torch.ones(len(timesteps), device=timesteps.device)
        return min_snr_weights(compute_snr(self.scheduler, timesteps), self.min_snr, self.scheduler.config["prediction_type"])


def min_snr_weights(snr: torch.Tensor, gamma: float, prediction: Prediction) -> torch.Tensor:
    """Weights of the loss such that the error of the predicted picture counts min(snr, gamma) (arXiv 2303.09556, section 3.4).

    The square error of the noise is snr times that of the picture, the square error of v is snr + 1 times that.
    """
    if prediction == "epsilon":
        return (gamma / snr).clamp(max=1)  # min(snr, gamma) / snr, and its limit where snr = 0
    return snr.clamp(max=gamma) / (snr + 1)
