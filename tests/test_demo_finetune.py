"""The demo's training loop on a model small enough to know the answer, and the adapter handed to PEFT."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from squareq_fx.adapters import Adapter, LayerAdapter
from squareq_fx.demo.finetune import Recipe, evaluate, flow_matching_loss, make_batch, make_batches, predict, train
from squareq_fx.demo.peft_arm import inject
from squareq_fx.demo.pictures import Pictures
from squareq_fx.demo.sampling import NULL_CLASS


def pictures(count: int = 30) -> Pictures:
    generator = torch.Generator().manual_seed(0)
    return Pictures(torch.rand(count, 1, 8, 8, generator=generator), torch.randint(10, (count,), generator=generator))


def generator(seed: int = 1) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Constant(torch.nn.Module):
    """Predicts one velocity everywhere: its best is the mean of noise - picture."""

    def __init__(self) -> None:
        super().__init__()
        self.velocity = torch.nn.Parameter(torch.zeros(()))

    def forward(self, hidden_states: torch.Tensor, **_: object) -> tuple[torch.Tensor]:
        return (self.velocity.expand_as(hidden_states),)


@given(seed=st.integers(0, 2**31))
def test_loss_is_zero_for_the_true_velocity(seed: int) -> None:
    """The model is shown (1 - t) x + t noise, from which this denoiser, which knows x, gets noise - x."""
    batch = make_batch(pictures(), generator(seed))

    def denoiser(hidden_states: torch.Tensor, **call: torch.Tensor) -> tuple[torch.Tensor]:
        assert call["timestep"].min() >= 1 and call["timestep"].max() <= 1000
        return ((hidden_states - batch.pictures) / (call["timestep"] / 1000).view(-1, 1, 1, 1),)

    assert flow_matching_loss(denoiser, batch).item() < 1e-6
    assert predict(denoiser, batch).shape == batch.pictures.shape


def test_batches_are_those_of_the_seed_and_drop_a_tenth_of_the_labels() -> None:
    recipe = Recipe(steps=40, batch=50)
    assert torch.equal(make_batches(pictures(), Recipe(steps=3, batch=50))[2].noise, make_batches(pictures(), recipe)[2].noise)
    first, again, other = (make_batches(pictures(), r) for r in (recipe, recipe, dataclasses.replace(recipe, seed=1)))
    assert len(first) == 40 and all(b.pictures.shape == (50, 1, 8, 8) for b in first)
    assert all(torch.equal(a, b) for x, y in zip(first, again) for a, b in zip(vars(x).values(), vars(y).values()))
    assert not torch.equal(first[0].noise, other[0].noise) and not torch.equal(first[0].noise, first[1].noise)
    assert -1 <= min(b.pictures.min() for b in first) < 0 < max(b.pictures.max() for b in first) <= 1
    dropped = torch.cat([b.labels for b in first]).eq(NULL_CLASS).float().mean().item()
    assert dropped == pytest.approx(0.1, abs=0.03)
    assert not make_batch(pictures(), generator()).labels.eq(NULL_CLASS).any()


def test_training_finds_the_known_optimum_and_its_curve_says_how() -> None:
    recipe = Recipe(steps=63, batch=64, lr=0.1, evaluate_every=20)
    batches, held_out = make_batches(pictures(), recipe), make_batch(pictures(), generator())
    model, seen = Constant(), []
    curve = train(model, model.parameters(), batches, held_out, recipe, lambda done, loss: seen.append((done, loss)))
    best = torch.stack([(b.noise - b.pictures).mean() for b in batches]).mean()
    assert model.velocity.item() == pytest.approx(best.item(), abs=0.02)
    assert [done for done, _ in curve.held_out] == [0, 20, 40, 60, 63]
    assert curve.start == pytest.approx((held_out.noise - held_out.pictures).square().mean().item(), rel=1e-6)
    assert curve.end == evaluate(model, held_out)
    assert seen == list(enumerate(curve.training, start=1)) and len(curve.training) == 63
    assert curve.training[0] == pytest.approx((batches[0].noise - batches[0].pictures).square().mean().item(), rel=1e-6)
    assert 0 < curve.step_seconds < 5


@pytest.mark.parametrize("steps", [1, 9, 30])
def test_rate_rises_to_the_recipe_s_and_falls_to_zero(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rates: list[float] = []

    class Recording(torch.optim.SGD):
        def step(self, closure: None = None) -> None:  # type: ignore[override]
            rates.append(self.param_groups[0]["lr"])

    monkeypatch.setattr(torch.optim, "AdamW", Recording)
    model, recipe = Constant(), Recipe(steps=steps, batch=4, lr=0.5, warmup=10)
    train(model, model.parameters(), make_batches(pictures(), recipe), make_batch(pictures(), generator()), recipe)
    assert rates[:10] == pytest.approx([0.05 * (i + 1) for i in range(min(steps, 10))])
    falling = rates[9:]
    assert falling == sorted(falling, reverse=True)
    assert steps < 30 or rates[-1] < 0.01


class Small(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = torch.nn.ModuleList(torch.nn.ModuleDict({"to_q": torch.nn.Linear(6, 5)}) for _ in range(2))
        self.out = torch.nn.Linear(5, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = self.out(block["to_q"](x))
        return x


def small_adapter(rank: int = 3, alpha: float = 6.0) -> Adapter:
    layers = [f"blocks.{i}.to_q" for i in range(2)]
    g = generator()
    return Adapter(
        {n: LayerAdapter(torch.randn(rank, 6, generator=g), torch.randn(5, rank, generator=g), alpha) for n in layers}
    )


def test_peft_gets_the_adapter_s_values_and_nothing_else_trains() -> None:
    pytest.importorskip("peft")
    model, adapter = Small(), small_adapter()
    x = torch.randn(4, 6, generator=generator())
    merged = Small()
    merged.load_state_dict(model.state_dict())
    for path, layer in adapter.layers.items():
        merged.get_submodule(path).weight.data += 2.0 * layer.up @ layer.down  # alpha / rank = 2
    trainable = inject(model, adapter)
    assert set(trainable) == {f"{path}.lora_{side}.default.weight" for path in adapter.layers for side in "AB"}
    assert {n for n, p in model.named_parameters() if p.requires_grad} == set(trainable)
    torch.testing.assert_close(model(x), merged(x), rtol=1e-4, atol=1e-4)


def test_peft_takes_no_adapter_of_several_ranks() -> None:
    pytest.importorskip("peft")
    mixed = Adapter({**small_adapter().layers, "out": LayerAdapter(torch.zeros(2, 5), torch.zeros(6, 2), 2.0)})
    with pytest.raises(ValueError, match="several ranks and alphas"):
        inject(Small(), mixed)
