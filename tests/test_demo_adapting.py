"""The demo's fine-tuning of the shipped model, with fewer steps and pictures; its figures derived again another way."""

from __future__ import annotations

import dataclasses
import io
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import torch
from rich.console import Console

import squareq_fx
from squareq_fx.demo import adapting
from squareq_fx.demo.adapting import fine_tune
from squareq_fx.demo.finetune import Recipe
from squareq_fx.demo.lesson import make_lesson
from squareq_fx.demo.model import load_digits_model
from squareq_fx.demo.pictures import drawn_digits
from squareq_fx.demo.results import FineTuning
from squareq_fx.demo.sampling import sample_digits
from squareq_fx.demo.stages import Stages
from squareq_fx.slab import Slab

pytestmark = pytest.mark.slow

RECIPE = Recipe(steps=40, batch=32)
COLUMNS, SEED = 2, 7


@dataclass(frozen=True)
class Base:
    """The float model, its slab, and what a compiled module without adapters draws."""

    model: torch.nn.Module
    slab: Slab
    drawn: torch.Tensor


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Base]:
    model = load_digits_model()
    with squareq_fx.build_slab(model, tmp_path_factory.mktemp("slab") / "digits", progress=False) as slab:
        gm = squareq_fx.compile(model, slab, progress=False)
        drawn = sample_digits(gm, columns=COLUMNS, seed=SEED)
        gm.shutdown()
        yield Base(model, slab, drawn)


def run(base: Base, folder: Path, recipe: Recipe, stages: Stages | None = None) -> FineTuning:
    with stages or Stages(Console(file=io.StringIO())) as shown:
        return fine_tune(base.model, base.slab, base.drawn, folder, shown, columns=COLUMNS, seed=SEED, recipe=recipe)


@pytest.fixture(scope="module")
def tuned(base: Base, tmp_path_factory: pytest.TempPathFactory) -> FineTuning:
    pytest.importorskip("sklearn")
    pytest.importorskip("peft")
    state = torch.get_rng_state()
    result = run(base, tmp_path_factory.mktemp("tuned") / "adapter", RECIPE)
    assert torch.equal(torch.get_rng_state(), state)  # torch's own random numbers go on as if nothing had been
    return result


def loss_of(model: torch.nn.Module, batch: object) -> float:
    """The loss by its definition, pixel by pixel in float64."""
    values = vars(batch)
    pictures, noise, t = values["pictures"], values["noise"], values["timestep"].double() / 1000
    noisy = torch.stack([(1 - s) * p.double() + s * n.double() for p, n, s in zip(pictures, noise, t)]).float()
    with torch.no_grad():
        velocity = model(noisy, timestep=values["timestep"], class_labels=values["labels"]).sample
    return (velocity.double() - (noise - pictures).double()).square().mean().item()


def test_training_teaches_the_style_as_peft_does(tuned: FineTuning) -> None:
    ours, peft = tuned.curve, tuned.peft_curve
    assert peft is not None
    assert ours.end < 0.5 * ours.start and ours.start > 2 * tuned.upright_loss
    assert ours.start == pytest.approx(peft.start, rel=0.01) and ours.end == pytest.approx(peft.end, rel=0.01)
    assert len(ours.training) == RECIPE.steps
    assert max(abs(a - b) for a, b in zip(ours.training, peft.training)) < 0.01  # batch by batch, all the way
    slants = {row.what: row.slant for row in tuned.rows}
    assert abs(slants["adapter off"]) < 6 and slants["adapter on"] > 14
    assert slants["adapter on"] == pytest.approx(slants["PEFT on the float model"], abs=2)
    rows = {row.what: row for row in tuned.rows}
    off, on = rows["adapter off"], rows["adapter on"]
    assert None not in (off.upright, off.italic, on.italic)
    assert off.upright >= 0.9 and on.italic >= 0.7 > off.italic  # type: ignore[operator]


def test_the_base_is_unchanged_and_the_file_is_the_adapter(tuned: FineTuning, base: Base) -> None:
    assert tuned.base.is_unchanged and tuned.base.reloaded == 0
    assert torch.equal(tuned.before, base.drawn) and tuned.base.pixels == base.drawn.numel()
    assert not torch.equal(tuned.after, tuned.before)
    assert tuned.adapter.name == "pytorch_lora_weights.safetensors"
    assert tuned.adapter.stat().st_size == tuned.sizes[-1].nbytes


def test_the_figures_hold_for_the_file_in_peft_s_hands(tuned: FineTuning, base: Base) -> None:
    """PEFT loads what was saved into a fresh float model, which then has the loss and draws the digits that are reported."""
    from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict
    from safetensors.torch import load_file

    lesson = make_lesson(base.model, RECIPE, COLUMNS)
    assert loss_of(base.model, lesson.held_out) == pytest.approx(tuned.peft_curve.start, rel=1e-5)  # type: ignore[union-attr]
    assert loss_of(base.model, lesson.upright_held_out) == pytest.approx(tuned.upright_loss, rel=1e-5)
    state = {key.removeprefix("transformer."): value for key, value in load_file(tuned.adapter).items()}
    layers = sorted({key.rpartition(".lora_")[0] for key in state})
    assert len(layers) == tuned.layers == 24 and sum(v.numel() for v in state.values()) == tuned.parameters
    model = load_digits_model()
    inject_adapter_in_model(LoraConfig(r=RECIPE.rank, lora_alpha=RECIPE.rank, target_modules=layers), model)
    loaded = set_peft_model_state_dict(model, state)
    assert not loaded.unexpected_keys
    model.eval()
    assert loss_of(model, lesson.held_out) == pytest.approx(tuned.curve.end, rel=0.01)
    drawn = sample_digits(model, columns=COLUMNS, seed=SEED)
    assert (drawn - tuned.after).abs().mean() < 0.02 < (drawn - tuned.before).abs().mean()


def test_slants_are_those_of_a_least_squares_line(tuned: FineTuning) -> None:
    """The line of columns on heights through all the ink, each picture about its own middle."""
    for what, samples in (("adapter off", tuned.before), ("adapter on", tuned.after)):
        heights, columns, weights = [], [], []
        for picture in samples.double()[:, 0]:
            ink = [(7 - r, c, picture[r, c].item()) for r in range(8) for c in range(8)]
            total = sum(w for _, _, w in ink)
            mean = [sum(entry[i] * entry[2] for entry in ink) / total for i in (0, 1)]
            heights += [h - mean[0] for h, _, _ in ink]
            columns += [c - mean[1] for _, c, _ in ink]
            weights += [w for _, _, w in ink]
        design = torch.tensor(heights)[:, None] * torch.tensor(weights)[:, None].sqrt()
        steepness = torch.linalg.lstsq(design, torch.tensor(columns)[:, None] * torch.tensor(weights)[:, None].sqrt())
        expected = math.degrees(math.atan(steepness.solution.item()))
        (reported,) = [row.slant for row in tuned.rows if row.what == what]
        assert reported == pytest.approx(expected, abs=0.01)


def test_training_streams_through_an_arena_smaller_than_the_model(tuned: FineTuning, base: Base) -> None:
    sizes = {row.what: row.nbytes for row in tuned.sizes}
    linears = [m for m in base.model.modules() if isinstance(m, torch.nn.Linear)]
    int8 = sum(m.weight.numel() for m in linears)
    in_float = sum(p.nbytes for p in base.model.parameters())
    assert sizes["arena"] == tuned.timeline.arena_bytes >= tuned.timeline.peak_bytes
    assert 0 < sizes["arena"] / 0.6 < int8 < sizes["all streamed weights"] < in_float / 3
    assert sizes["moved, forward"] == sizes["all streamed weights"] > sizes["moved, backward"] > sizes["arena"]
    forward, backward = tuned.timeline.starts
    assert forward == 0 < backward < tuned.timeline.step_ms
    orders = [[], []]
    for stay in sorted(tuned.timeline.stays, key=lambda stay: stay.loaded or 0):
        if stay.name.startswith("transformer_blocks."):
            orders[stay.claimed >= backward].append(int(stay.name[-1]))
    assert orders == [[0, 1, 2, 3], [2, 1, 0]]  # and the last block stays from one to the other


def test_the_same_seed_gives_the_same_training_bit_for_bit(
    tuned: FineTuning, base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second compile and its first ten steps, in which the rate does not depend on how many there are."""
    monkeypatch.setattr(adapting, "peft_available", lambda: False)
    monkeypatch.setattr(adapting, "sample_digits", partial(sample_digits, steps=2))
    again = run(base, tmp_path / "adapter", dataclasses.replace(RECIPE, steps=10))
    assert again.curve.training == tuned.curve.training[:10]
    assert again.curve.held_out == tuned.curve.held_out[:2]
    assert again.curve.held_out[1][0] == 10


def test_without_scikit_learn_and_peft_the_model_teaches_itself(
    base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("lesson.has_real_digits", "judge.has_real_digits", "adapting.peft_available"):
        monkeypatch.setattr(f"squareq_fx.demo.{name}", lambda: False)
    monkeypatch.setattr("squareq_fx.demo.lesson.drawn_digits", partial(drawn_digits, columns=8))
    stages = Stages(Console(file=io.StringIO()))
    result = run(base, tmp_path / "adapter", Recipe(steps=12, batch=16), stages)
    assert result.peft_curve is None and result.peft_after is None
    assert "digits the float model drew" in result.source
    assert all(row.upright is None and row.italic is None for row in result.rows)
    assert result.curve.end < 0.8 * result.curve.start and result.base.is_unchanged
    assert not any("PEFT" in name for name, _ in stages.seconds)
