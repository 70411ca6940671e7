"""The shipped digits model and its sampler."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from squareq_fx.demo.judge import agreement
from squareq_fx.demo.model import MODEL_DIR, load_digits_model
from squareq_fx.demo.sampling import NULL_CLASS, TIMESTEPS, grid_labels, sample_digits, to_grid


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    return load_digits_model()


def test_shipped_files_take_at_most_three_megabytes() -> None:
    files = [f for f in MODEL_DIR.iterdir() if f.suffix in {".json", ".safetensors"}]
    assert {f.name for f in files} == {"config.json", "diffusion_pytorch_model.safetensors"}
    assert sum(f.stat().st_size for f in files) <= 3_000_000


def test_model_has_four_identical_blocks(model: torch.nn.Module) -> None:
    shapes = [{k: v.shape for k, v in block.state_dict().items()} for block in model.transformer_blocks]
    assert len(shapes) >= 4 and all(s == shapes[0] for s in shapes)
    assert not model.training and model.dtype == torch.float32
    assert all(p.isfinite().all() for p in model.parameters())


def test_digits_are_recognised_as_the_class_asked_for(model: torch.nn.Module) -> None:
    pytest.importorskip("sklearn")
    samples = sample_digits(model, columns=8, seed=3)
    assert agreement(samples, grid_labels(8)) >= 0.9


def test_samples_of_one_class_differ(model: torch.nn.Module) -> None:
    samples = sample_digits(model, columns=4, seed=5).reshape(10, 4, 64)
    distances = torch.cdist(samples, samples) + 1e3 * torch.eye(4)
    assert distances.min() > 0.3  # a real digit and the one nearest to it are about 1 apart


@given(seed=st.integers(0, 2**31), steps=st.sampled_from([1, 2, 5, 20, 25]), columns=st.integers(1, 3))
def test_sampler_is_exact_for_data_of_a_single_picture(seed: int, steps: int, columns: int) -> None:
    """Then v(x, t) = (x - picture) / t, whose solution is a straight line: no step is too large for it."""
    pictures = torch.rand(10 * columns, 1, 8, 8, generator=torch.Generator().manual_seed(seed))

    def denoiser(hidden_states: torch.Tensor, **call: torch.Tensor) -> tuple[torch.Tensor]:
        t = (call["timestep"] / TIMESTEPS).view(-1, 1, 1, 1)
        return ((hidden_states - (2 * torch.cat([pictures, pictures]) - 1)) / t,)

    samples = sample_digits(denoiser, columns=columns, steps=steps, seed=seed)
    torch.testing.assert_close(samples, pictures, rtol=0, atol=1e-5)


@given(guidance=st.floats(0, 4), seed=st.integers(0, 2**31))
def test_guidance_extrapolates_from_the_null_class(guidance: float, seed: int) -> None:
    """Constant velocities, one for a class and one for none: the end point is a closed form."""

    def denoiser(hidden_states: torch.Tensor, **call: torch.Tensor) -> tuple[torch.Tensor]:
        velocity = torch.where(call["class_labels"] == NULL_CLASS, 0.02, 0.05).view(-1, 1, 1, 1)
        return (velocity.expand_as(hidden_states),)

    noise = torch.randn(10, 1, 8, 8, generator=torch.Generator().manual_seed(seed))
    expected = ((noise - (0.02 + guidance * 0.03) + 1) / 2).clamp(0, 1)
    samples = sample_digits(denoiser, columns=1, guidance=guidance, seed=seed)
    torch.testing.assert_close(samples, expected, rtol=0, atol=1e-5)


def test_sampling_is_deterministic_and_reports_its_steps(model: torch.nn.Module) -> None:
    steps: list[int] = []
    first = sample_digits(model, columns=1, steps=4, seed=1, on_step=steps.append)
    assert steps == [1, 2, 3, 4]
    assert torch.equal(first, sample_digits(model, columns=1, steps=4, seed=1))
    assert not torch.equal(first, sample_digits(model, columns=1, steps=4, seed=2))
    assert first.shape == (10, 1, 8, 8) and first.dtype == torch.float32
    assert first.min() >= 0 and first.max() <= 1


@pytest.mark.parametrize("wrong", [{"steps": 3}, {"steps": 0}, {"columns": 0}])
def test_sampler_refuses_what_it_cannot_do(model: torch.nn.Module, wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="columns must be positive and steps divide 1000"):
        sample_digits(model, **wrong)


@given(columns=st.integers(1, 5), digit=st.integers(0, 9), column=st.data())
def test_grid_puts_every_sample_in_its_row_and_column(columns: int, digit: int, column: st.DataObject) -> None:
    where = column.draw(st.integers(0, columns - 1))
    samples = torch.zeros(10 * columns, 1, 8, 8)
    index = digit * columns + where
    samples[index] = torch.arange(1.0, 65.0).reshape(1, 8, 8)
    grid = to_grid(samples)
    assert grid.shape == (91, 9 * columns + 1)
    cell = grid[9 * digit + 1 : 9 * digit + 9, 9 * where + 1 : 9 * where + 9]
    assert torch.equal(cell, samples[index, 0]) and grid.count_nonzero() == 64
    assert grid_labels(columns)[index] == digit
