"""The trainer's objectives against their formulas."""

from __future__ import annotations

import math
from typing import Any

import example_pipelines  # noqa: F401  puts the examples on the path
import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from hypothesis import given
from hypothesis import strategies as st
from lora_trainer.objectives import Diffusion, FlowMatching, Noised, loss_of, min_snr_weights, shift_for
from models import seeded

LATENTS = torch.randn(64, 4, 6, 10, generator=torch.Generator().manual_seed(3))
GAMMA = 5.0


def scheduler(prediction: str = "epsilon", **config: Any) -> DDPMScheduler:
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    return DDPMScheduler(prediction_type=prediction, **betas, **config)


def broadcast(values: torch.Tensor) -> torch.Tensor:
    return values.view(-1, 1, 1, 1)


# ---------------------------------------------------------------------------------------------------- flow matching


@pytest.mark.parametrize("sampling", ["uniform", "logit-normal"])
@pytest.mark.parametrize("shift", [1.0, 3.0, None])
def test_flow_matching_is_a_straight_line(sampling: Any, shift: float | None) -> None:
    """x_t = x + t v with v = noise - x, so from any t one Euler step back of length t gives the picture."""
    with seeded(0):
        noised = FlowMatching(sampling, shift=shift).noised(LATENTS)
    t = noised.timesteps / 1000
    assert noised.timesteps.dtype == torch.float32 and t.min() >= 0 and t.max() <= 1
    torch.testing.assert_close(noised.sample - broadcast(t) * noised.target, LATENTS, rtol=0, atol=2e-6)
    noise = noised.target + LATENTS
    assert abs(noise.mean()) < 0.03 and abs(noise.std() - 1) < 0.03
    assert torch.equal(noised.weights, torch.ones(64))


def test_times_of_flow_matching() -> None:
    """Logit-normal: half of them below the logistic function of the mean; the density of the paper at two points."""
    with seeded(0):
        uniform = FlowMatching("uniform").times(200_000, 1)
        normal = FlowMatching("logit-normal", mean=0.5, std=1.3).times(200_000, 1)
    for share in (0.1, 0.5, 0.9):
        assert (uniform < share).float().mean().item() == pytest.approx(share, abs=5e-3)
    assert (normal < 1 / (1 + math.exp(-0.5))).float().mean() == pytest.approx(0.5, abs=5e-3)
    for t in (0.3, 0.8):
        logit = math.log(t / (1 - t))
        density = math.exp(-((logit - 0.5) ** 2) / (2 * 1.3**2)) / (1.3 * math.sqrt(2 * math.pi) * t * (1 - t))
        measured = ((normal > t - 0.02) & (normal < t + 0.02)).float().mean() / 0.04
        assert measured.item() == pytest.approx(density, rel=0.03)


@given(st.floats(0.1, 10), st.integers(0, 99))
def test_the_shift_is_that_of_the_scheduler(shift: float, seed: int) -> None:
    with seeded(seed):
        plain = FlowMatching("uniform").times(50, 1)
    with seeded(seed):
        shifted = FlowMatching("uniform", shift=shift).times(50, 1)
    sampled = FlowMatchEulerDiscreteScheduler(shift=shift)
    sampled.set_timesteps(sigmas=plain.sort(descending=True).values.tolist())
    torch.testing.assert_close(sampled.sigmas[:-1], shifted.sort(descending=True).values, rtol=1e-5, atol=1e-6)


def test_the_shift_of_a_resolution_is_that_of_the_pipeline() -> None:
    sampled = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    t = torch.linspace(0.9, 0.1, 9)
    for tokens, mu in ((256, 0.5), (4096, 1.15), (1024, 0.5 + 768 * 0.65 / 3840)):
        sampled.set_timesteps(sigmas=t.tolist(), mu=mu)
        s = shift_for(tokens)
        torch.testing.assert_close(sampled.sigmas[:-1], s * t / (1 + (s - 1) * t), rtol=1e-5, atol=1e-6)
    with seeded(0):
        small = FlowMatching("uniform", shift=None).noised(torch.zeros(8, 1, 32, 32)).timesteps
    with seeded(0):
        large = FlowMatching("uniform", shift=None).noised(torch.zeros(8, 1, 128, 128)).timesteps
    assert (large > small).all()


# --------------------------------------------------------------------------------------------------------- diffusion


def test_epsilon_and_v() -> None:
    with seeded(0):
        epsilon = Diffusion(scheduler()).noised(LATENTS)
    with seeded(0):
        velocity = Diffusion(scheduler("v_prediction")).noised(LATENTS)
    assert torch.equal(epsilon.timesteps, velocity.timesteps) and torch.equal(epsilon.sample, velocity.sample)
    times = epsilon.timesteps.long()
    assert torch.equal(times.float(), epsilon.timesteps)
    assert times.min() >= 0 and times.max() < 1000 and len(times.unique()) > 50
    a = broadcast(scheduler().alphas_cumprod[times].sqrt())
    s = broadcast((1 - scheduler().alphas_cumprod[times]).sqrt())
    noise = epsilon.target
    torch.testing.assert_close(epsilon.sample, a * LATENTS + s * noise)
    torch.testing.assert_close(velocity.target, a * noise - s * LATENTS)
    torch.testing.assert_close(a * velocity.sample - s * velocity.target, LATENTS, rtol=0, atol=2e-6)


def test_min_snr_weighs_the_error_of_the_picture() -> None:
    """Whatever the model answers: the loss of a wrong picture is min(snr, gamma) times its square error, for epsilon and v."""
    times = torch.arange(0, 1000, 37)
    wrong = 0.1 * torch.randn(len(times), 4, 6, 10, generator=torch.Generator().manual_seed(0))
    alphas = scheduler().alphas_cumprod[times].double()
    a, s, snr = broadcast(alphas.sqrt()), broadcast((1 - alphas).sqrt()), alphas / (1 - alphas)
    noise = torch.randn_like(wrong).double()
    picture = LATENTS[: len(times)].double()
    sample = a * picture + s * noise
    expected = (snr.clamp(max=GAMMA) * wrong.double().square().flatten(1).mean(1)).mean()
    guess = picture + wrong  # what the model takes the picture for; its noise and v follow from the sample
    guessed_noise = (sample - a * guess) / s
    for prediction, target, answer in (
        ("epsilon", noise, guessed_noise),
        ("v_prediction", a * noise - s * picture, a * guessed_noise - s * guess),
    ):
        weights = Diffusion(scheduler(prediction), GAMMA).weights(times).double()
        loss = loss_of_double(answer, target, weights)
        assert loss.item() == pytest.approx(expected.item(), rel=1e-4)


def loss_of_double(answer: torch.Tensor, target: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    return (weights * (answer - target).square().flatten(1).mean(1)).mean()


@given(st.floats(1e-6, 1e6), st.floats(0.1, 20))
def test_min_snr_formulas(snr: float, gamma: float) -> None:
    value = torch.tensor([snr], dtype=torch.float64)
    assert min_snr_weights(value, gamma, "epsilon").item() == pytest.approx(min(snr, gamma) / snr)
    assert min_snr_weights(value, gamma, "v_prediction").item() == pytest.approx(min(snr, gamma) / (snr + 1))


def test_min_snr_where_there_is_no_signal() -> None:
    """A schedule that ends in pure noise (arXiv 2305.08891): finite weights, 0 for v."""
    ends_in_noise = scheduler("v_prediction", rescale_betas_zero_snr=True)
    weights = Diffusion(ends_in_noise, GAMMA).weights(torch.tensor([0, 500, 999]))
    assert weights.isfinite().all() and weights[2] < 1e-6
    assert min_snr_weights(torch.tensor([0.0]), GAMMA, "epsilon").item() == 1


def test_without_min_snr_all_times_are_equal() -> None:
    assert torch.equal(Diffusion(scheduler()).weights(torch.tensor([1, 500, 999])), torch.ones(3))


# -------------------------------------------------------------------------------------------------------------- loss


def test_the_loss_is_in_float32_and_weighted() -> None:
    target = torch.randn(3, 2, 4, 4)
    answer = torch.randn(3, 2, 4, 4, dtype=torch.bfloat16, requires_grad=True)
    weights = torch.tensor([1.0, 0.5, 0.0])
    loss = loss_of(answer, Noised(target, torch.zeros(3), target, weights))
    by_hand = sum(w * ((answer[i].float() - target[i]) ** 2).mean() for i, w in enumerate(weights)) / 3
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(by_hand.item(), rel=1e-6)
    loss.backward()
    assert answer.grad is not None and not answer.grad[2].any() and answer.grad[0].any()


@pytest.mark.parametrize(
    "objective", [FlowMatching(), FlowMatching("uniform"), Diffusion(scheduler()), Diffusion(scheduler("v_prediction"), GAMMA)]
)
def test_a_seed_gives_the_same_batch(objective: Any) -> None:
    with seeded(1):
        a = objective.noised(LATENTS)
    with seeded(1):
        b = objective.noised(LATENTS)
    assert all(torch.equal(getattr(a, name), getattr(b, name)) for name in ("sample", "timesteps", "target", "weights"))
