"""train_lora.py from end to end on tiny pipelines: several resolutions, killed and resumed, and refused before compiling."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import typer
from diffusers import DiffusionPipeline
from example_pipelines import EXAMPLES, cache_latents, save_pictures, save_pipeline, train_lora
from lora_trainer.data import Batches
from lora_trainer.memory import check_memory, forecast_run
from lora_trainer.objectives import Diffusion, FlowMatching, loss_of
from lora_trainer.preparing import prepare
from lora_trainer.settings import Settings, check_same_run, write_settings
from models import seeded
from PIL import Image
from typer.testing import CliRunner

import squareq_fx
from squareq_fx.checkpoint import latest_checkpoint, save_checkpoint
from squareq_fx.errors import SquareQError

SIZES = [(40, 40), (64, 30), (30, 64), (33, 32), (50, 50), (70, 32)]
BUCKETS = {(32, 32), (40, 24), (24, 40)}
STEPS = 9


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pipelines and caches of both families."""
    path = tmp_path_factory.mktemp("train")
    images = save_pictures(path / "images", SIZES)
    for family in ("sdxl", "flux"):
        arguments = [str(save_pipeline(family, path / family)), str(images), str(path / f"{family}_cache")]
        options = ["--resolution", "32", "--bucket-step", "8", "--dtype", "float32", "--device", "cpu", "--prompt", "a cat"]
        result = CliRunner().invoke(cache_latents.app, [*arguments, *options])
        assert result.exit_code == 0, result.output
    return path


def settings(root: Path, family: str, output: Path, **changes: Any) -> Settings:
    quick = {
        "rank": 2,
        "steps": STEPS,
        "batch_size": 2,
        "lr": 1e-2,
        "checkpoint_every": 2,
        "sample_steps": 2,
        "device": "cpu",
        "dtype": "float32",
        "tensorboard": False,
        "build_slab": True,
    }
    return Settings(root / family, root / f"{family}_cache", output, root / f"{family}_slab", **{**quick, **changes})


def arguments(chosen: Settings) -> list[str]:
    """The command line of these settings."""
    given: list[str] = []
    for field in dataclasses.fields(chosen):
        value, name = getattr(chosen, field.name), field.name.replace("_", "-")
        if field.name in ("pipeline", "cache", "output"):
            given.append(str(value))
        elif isinstance(value, bool):
            given.append(f"--{name}" if value else f"--no-{name}")
        elif value is not None:
            given += [f"--{name}", str(value)]
    return given


# ------------------------------------------------------------------------------------------------------- whole runs


@pytest.mark.slow
def test_flux_killed_and_resumed_ends_with_the_same_bytes(root: Path, tmp_path: Path) -> None:
    """With everything that has a state: EMA, a schedule, accumulation across buckets, pictures in between."""
    options = {"ema": 0.9, "accumulate": 2, "lr_scheduler": "cosine", "warmup": 2, "sample_every": 3, "workers": 0}
    whole, broken = (settings(root, "flux", tmp_path / name, **options) for name in ("whole", "broken"))
    with seeded(0):
        train_lora.train(whole)
    kill(broken, random.Random(0))
    with seeded(1):
        train_lora.train(dataclasses.replace(broken, resume=True))
    for name in ("adapters.safetensors", "state.safetensors", "state.json"):
        a, b = ((run.output / f"checkpoint-{STEPS}" / name).read_bytes() for run in (whole, broken))
        assert a == b
    adapters = [safetensors.torch.load_file(run.output / "pytorch_lora_weights.safetensors") for run in (whole, broken)]
    assert list(adapters[0]) == list(adapters[1])
    assert all(torch.equal(a, b) for a, b in zip(adapters[0].values(), adapters[1].values()))
    assert sorted(os.listdir(whole.output)) == [
        "checkpoint-8",
        "checkpoint-9",
        "pytorch_lora_weights.safetensors",
        "samples",
        "settings.json",
    ]
    names = sorted(os.listdir(whole.output / "samples"))
    assert names == [f"step-{step:06}-00.png" for step in (3, 6, 9)] == sorted(os.listdir(broken.output / "samples"))
    pictures = [np.asarray(Image.open(run.output / "samples" / names[-1])) for run in (whole, broken)]
    assert np.array_equal(*pictures) and pictures[0].shape == (32, 32, 3)
    saved_is_the_average(whole, adapters[0])
    diffusers_loads_it(whole)


def kill(chosen: Settings, rng: random.Random) -> None:
    """Start the script, and send it SIGKILL some time after its first checkpoint."""
    command = [sys.executable, str(EXAMPLES / "train_lora.py"), *arguments(chosen)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    log = chosen.output.with_suffix(".log")
    with open(log, "wb") as file:
        child = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment, cwd="/")
        deadline = time.monotonic() + 240
        while latest_checkpoint(chosen.output) is None and child.poll() is None and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.2))
        child.send_signal(signal.SIGKILL)
        child.wait()
    assert child.returncode == -signal.SIGKILL, log.read_text()
    assert not (chosen.output / "pytorch_lora_weights.safetensors").exists()


def saved_is_the_average(chosen: Settings, adapter: dict[str, torch.Tensor]) -> None:
    state = safetensors.torch.load_file(chosen.output / f"checkpoint-{STEPS}" / "state.safetensors")
    averages = [tensor.numpy().tobytes() for name, tensor in state.items() if name.startswith("/ema/shadow_params/")]
    assert sorted(averages) == sorted(tensor.numpy().tobytes() for tensor in adapter.values())
    last = safetensors.torch.load_file(chosen.output / f"checkpoint-{STEPS}" / "adapters.safetensors")
    assert not {tensor.numpy().tobytes() for tensor in last.values()} & set(averages)


def diffusers_loads_it(chosen: Settings) -> None:
    pipeline = DiffusionPipeline.from_pretrained(chosen.pipeline)
    pipeline.set_progress_bar_config(disable=True)

    def picture() -> np.ndarray:
        generator = torch.Generator().manual_seed(0)
        return pipeline("a cat", width=32, height=32, num_inference_steps=2, generator=generator, output_type="np").images

    before = picture()
    pipeline.load_lora_weights(chosen.output)
    assert np.abs(picture() - before).max() > 1e-3


@pytest.mark.slow
def test_sdxl_learns_at_several_resolutions(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """v-prediction with min-SNR weights: the loss over the whole cache, with the same times and noise, is less than before.

    In bfloat16, on a slab of a model that was stored in float32.
    """
    objective = {"objective": "v_prediction", "min_snr": 5.0, "dtype": "bfloat16"}
    chosen = settings(root, "sdxl", tmp_path / "out", steps=30, checkpoint_every=0, sample_every=15, **objective)
    compiled: list[Any] = []
    compile_model = train_lora.compile_model
    monkeypatch.setattr(train_lora, "compile_model", lambda *a: compiled.append(compile_model(*a)) or compiled[0])
    seen: set[tuple[int, ...]] = set()
    backward = train_lora.backward

    def recording(gm: Any, batch: dict[str, torch.Tensor], *rest: Any) -> float:
        seen.add(tuple(batch["latents"].shape))
        return backward(gm, batch, *rest)

    monkeypatch.setattr(train_lora, "backward", recording)
    train_lora.train(chosen)
    (gm,), plan = compiled, prepare(dataclasses.replace(chosen, resume=True))
    assert {(2 * shape[3], 2 * shape[2]) for shape in seen} == BUCKETS and {shape[0] for shape in seen} == {1, 2}
    gm.disable_lora()
    before = whole_loss(gm, plan)
    gm.enable_lora()
    after = whole_loss(gm, plan)
    print(f"loss {before:.4f} -> {after:.4f}")
    assert after < 0.97 * before
    assert os.listdir(tmp_path / "out" / "samples") and latest_checkpoint(chosen.output) == chosen.output / "checkpoint-30"
    saved = safetensors.torch.load_file(chosen.output / "pytorch_lora_weights.safetensors")
    assert all(name.startswith("unet.") for name in saved)
    diffusers_loads_it(chosen)


@torch.no_grad()
def whole_loss(gm: Any, plan: Any) -> float:
    losses = []
    with seeded(0):
        for batch, _ in zip(Batches(plan.cache.samples, batch_size=1, seed=0), range(6 * len(SIZES))):
            noised = plan.objective.noised(batch.pop("latents"))
            inputs = {name: tensor.to(gm.dtype) for name, tensor in batch.items()}
            prediction = plan.family.predict(gm, noised.sample.to(gm.dtype), noised.timesteps, inputs, 1.0)
            losses.append(loss_of(prediction, noised).item())
    return sum(losses) / len(losses)


# ------------------------------------------------------------------------------------------- refused before compiling


@pytest.fixture
def never_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("compiled or built")

    monkeypatch.setattr(squareq_fx, "compile", refuse)
    monkeypatch.setattr(squareq_fx, "build_slab", refuse)


BAD = [
    ({"steps": 0, "lr": -1.0, "ema": 1.0}, r"--steps must be at least 1(?s:.)*--lr must be positive(?s:.)*--ema must be"),
    ({"lr_scheduler": "sine"}, "--lr-scheduler 'sine' is none of linear"),
    ({"device": "mps:7"}, "--device mps:7"),
    ({"build_slab": False, "slab": Path("/none/slab")}, "the slab /none/slab is not there: give --build-slab"),
    ({"backend": "cudagraph"}, "--backend cudagraph: .* records graphs of a CUDA device and cannot run on cpu"),
    ({"objective": "epsilon"}, "Flux is trained with flow, SDXL with"),
    ({"min_snr": 5.0}, "--min-snr weighs epsilon and v_prediction"),
    ({"shift": "far"}, "--shift is a positive number, or `resolution`, not 'far'"),
    ({"shift": "-1"}, "--shift is a positive number"),
    ({"rank": 0}, "rank must be a positive integer"),
    ({"targets": "("}, "is not a regular expression"),
    ({"cache": Path("/none")}, "holds no cached samples"),
    ({"pipeline": Path("/none")}, "is no pipeline directory"),
    ({"sample_size": "32"}, "--sample-size is WIDTHxHEIGHT, not '32'"),
    ({"sample_size": "34x32"}, "--sample-size 34x32: both sides must be multiples of 4"),
]


@pytest.mark.usefixtures("never_compiled")
@pytest.mark.parametrize(("change", "message"), BAD, ids=lambda value: str(value)[:30])
def test_bad_options(root: Path, tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(SquareQError, match=message):
        train_lora.train(dataclasses.replace(settings(root, "flux", tmp_path / "out"), **change))
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("never_compiled")
def test_a_cache_of_the_other_family(root: Path, tmp_path: Path) -> None:
    for family, other in (("flux", "sdxl"), ("sdxl", "flux")):
        chosen = dataclasses.replace(settings(root, family, tmp_path), cache=root / f"{other}_cache")
        with pytest.raises(SquareQError, match=f"the model is {family}, the cache has 8 of {other}"):
            train_lora.train(chosen)


@pytest.mark.usefixtures("never_compiled")
def test_packages_that_are_missing(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name in ("tensorboard", "bitsandbytes") else find(name, *a)
    )
    with pytest.raises(SquareQError, match=r"`pip install bitsandbytes`(?s:.)*TensorBoard is not installed"):
        train_lora.train(settings(root, "flux", tmp_path, tensorboard=True, optimizer="adamw8bit"))


@pytest.mark.usefixtures("never_compiled")
def test_pictures_need_prompts_and_a_vae(root: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("model_index.json", "transformer", "scheduler"):
        (bare / name).symlink_to(root / "flux" / name)
    chosen = settings(root, "flux", tmp_path / "out", sample_every=1)
    with pytest.raises(SquareQError, match="--sample-every needs vae in"):
        prepare(dataclasses.replace(chosen, pipeline=bare))
    prepare(dataclasses.replace(chosen, pipeline=bare, sample_every=0))
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / "a.safetensors").symlink_to(root / "flux_cache" / "picture0.png.safetensors")
    with pytest.raises(SquareQError, match="has no prompts; run cache_latents.py again with --prompt"):
        prepare(dataclasses.replace(chosen, cache=cache))


@pytest.mark.usefixtures("never_compiled")
def test_another_run_is_not_resumed(root: Path, tmp_path: Path) -> None:
    chosen = settings(root, "flux", tmp_path / "out")
    write_settings(chosen)
    layer = torch.nn.Linear(2, 2)
    save_checkpoint(chosen.output, step=3, module=layer, optimizer=torch.optim.SGD(layer.parameters()))
    with pytest.raises(SquareQError, match="holds checkpoint-3: give --resume to go on, or another output"):
        prepare(chosen)
    resumed = dataclasses.replace(chosen, resume=True, steps=99, workers=2, sample_every=7, device="cpu")
    assert prepare(resumed).checkpoint == chosen.output / "checkpoint-3"
    with pytest.raises(SquareQError, match=r"rank was 2 and is 4(?s:.)*lr was 0.01 and is 0.1"):
        prepare(dataclasses.replace(resumed, rank=4, lr=0.1))
    with pytest.raises(SquareQError, match="compute was 'w8a16' and is 'w8a8'"):
        prepare(dataclasses.replace(resumed, compute="w8a8"))
    older = json.loads((chosen.output / "settings.json").read_text())
    del older["compute"], older["backend"], older["save"]
    (chosen.output / "settings.json").write_text(json.dumps(older))
    check_same_run(resumed)  # before there were these options, they had what is their default now
    (chosen.output / "settings.json").write_text("torn")
    with pytest.raises(SquareQError, match="settings.json cannot be read"):
        check_same_run(resumed)


def test_what_decides_the_speed_reaches_the_compiler(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = settings(root, "flux", tmp_path / "out", compute="w8a8", backend="inductor", save="offload")
    given: dict[str, Any] = {}
    monkeypatch.setattr(squareq_fx, "compile", lambda *a, **options: given.update(options))
    train_lora.compile_model(chosen, prepare(chosen))
    assert (given["compute"], given["backend"], given["save"]) == ("w8a8", "inductor", "offload")


def test_a_loss_that_is_not_finite(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Fake(torch.nn.Linear):
        device, dtype = torch.device("cpu"), torch.float32

    monkeypatch.setattr(train_lora, "compile_model", lambda *a: Fake(2, 2))
    monkeypatch.setattr(train_lora, "forecast_run", lambda *a: None)
    monkeypatch.setattr(train_lora, "check_memory", lambda *a: "what it will hold")
    monkeypatch.setattr(train_lora, "backward", lambda *a: float("nan"))
    with pytest.raises(SquareQError, match="the loss of step 1 is nan; begin a new run with a lower --lr"):
        train_lora.train(settings(root, "flux", tmp_path / "out"))
    assert latest_checkpoint(tmp_path / "out") is None


# ---------------------------------------------------------------------------------------------------------- options


def test_objectives_of_the_options(root: Path, tmp_path: Path) -> None:
    flux = prepare(settings(root, "flux", tmp_path, shift="resolution", timestep_sampling="uniform", logit_std=2.0)).objective
    assert flux == FlowMatching("uniform", 0.0, 2.0, None)
    assert prepare(settings(root, "flux", tmp_path, shift="3")).objective == FlowMatching(shift=3.0)
    plan = prepare(settings(root, "sdxl", tmp_path, min_snr=5.0))
    assert isinstance(plan.objective, Diffusion) and plan.objective.min_snr == 5.0 and plan.prediction == "epsilon"
    pipeline = DiffusionPipeline.from_pretrained(root / "sdxl")
    assert torch.allclose(plan.objective.scheduler.alphas_cumprod, pipeline.scheduler.alphas_cumprod)
    assert prepare(settings(root, "sdxl", tmp_path, objective="v_prediction")).prediction == "v_prediction"
    assert prepare(settings(root, "flux", tmp_path, targets="to_q, to_k")).lora.targets == ("to_q", "to_k")
    assert prepare(settings(root, "flux", tmp_path)).sample_size == (32, 32)
    assert prepare(settings(root, "flux", tmp_path, sample_size="40x16")).sample_size == (40, 16)


@pytest.mark.usefixtures("never_compiled")
def test_the_command_line_is_the_settings(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Settings] = []
    monkeypatch.setattr(train_lora, "train", given.append)
    app = typer.Typer()
    app.command()(train_lora.main)
    chosen = settings(root, "flux", tmp_path, ema=0.9, resume=True, sample_size="32x32", backing="disk", budget_gib=1.5)
    result = CliRunner().invoke(app, arguments(chosen))
    assert result.exit_code == 0, result.output
    assert given == [chosen]
    assert CliRunner().invoke(app, [*arguments(chosen), "--objective", "none"]).exit_code == 2
    monkeypatch.undo()
    result = CliRunner().invoke(app, [*arguments(chosen), "--steps", "0"])
    assert result.exit_code == 1 and "--steps must be at least 1" in result.output
    text = CliRunner().invoke(app, ["--help"], env={"COLUMNS": "300"}).output
    for field in dataclasses.fields(Settings):
        assert field.name.replace("_", "-") in text


def test_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from lora_trainer.reporting import Reporter
    from rich.console import Console
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    quiet = Console(quiet=True)
    for first, last in ((0, 5), (3, 6)):  # killed after step 5, resumed from the checkpoint of step 3
        with Reporter(quiet, steps=6, first=first, logs=tmp_path) as report:
            for step in range(first + 1, last + 1):
                report.step(step, 10 * first + step, {"lr": 0.1})
            report.pictures(last, [Image.new("RGB", (4, 6))], tmp_path / "samples")
        time.sleep(1.1)  # the files are told apart by the second they are begun in
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(1, 1), (2, 2), (3, 3), (4, 34), (5, 35), (6, 36)]
    assert {"train/lr", "train/seconds_a_step"} <= set(events.Tags()["scalars"])
    assert events.Tags()["images"] == ["samples/00"]
    assert sorted(os.listdir(tmp_path / "samples")) == ["step-000005-00.png", "step-000006-00.png"]


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["sdxl", "flux"])
def test_on_a_gpu(root: Path, tmp_path: Path, family: str) -> None:
    """In bfloat16 with streamed weights: pictures, EMA and a resumption, and the loss of every step is finite."""
    options = {"device": "cuda", "dtype": "bfloat16", "ema": 0.9, "sample_every": 2, "accumulate": 2}
    train_lora.train(settings(root, family, tmp_path, steps=4, **options))
    train_lora.train(settings(root, family, tmp_path, steps=6, resume=True, **options))
    adapter = safetensors.torch.load_file(tmp_path / "pytorch_lora_weights.safetensors")
    assert all(tensor.isfinite().all() for tensor in adapter.values())
    assert len(os.listdir(tmp_path / "samples")) == 3
    assert latest_checkpoint(tmp_path) == tmp_path / "checkpoint-6"


@pytest.mark.parametrize("family", ("sdxl", "flux"))
def test_the_memory_of_the_largest_batch_is_told_before_the_first_step(
    root: Path, tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = settings(root, family, tmp_path / "run")
    plan = prepare(chosen)
    gm = train_lora.compile_model(chosen, plan)
    state = torch.random.get_rng_state()
    found = forecast_run(gm, chosen, plan)
    assert torch.equal(torch.random.get_rng_state(), state)
    smaller = forecast_run(gm, dataclasses.replace(chosen, batch_size=1), plan)
    assert found.arena == smaller.arena and found.activations > 1.5 * smaller.activations
    trained = sum(p.numel() for p in gm.adapter_parameters().values())
    text = check_memory(found, trained, chosen, None)
    assert text.startswith("the largest batch will hold 0.00 GiB") and str(found) in text
    needed = found.peak + 12 * trained
    assert check_memory(found, trained, chosen, needed) == text
    with pytest.raises(SquareQError, match=r"The card has 0\.00 GiB free\. Try a smaller --batch-size"):
        check_memory(found, trained, chosen, needed - 1)
    with monkeypatch.context() as patch, pytest.raises(SquareQError, match="Try a smaller --batch-size"):
        patch.setattr(train_lora, "compile_model", lambda *a: gm)
        patch.setattr(train_lora, "free_memory", lambda *a: needed - 1)
        train_lora.train(chosen)
    assert not chosen.output.exists() and gm.last_step is None, "nothing was begun"
    recorded = dataclasses.replace(chosen, backend="cudagraph")
    assert "while it is recorded more" in check_memory(found, trained, recorded, needed)
    with pytest.raises(SquareQError, match="The card has"):
        check_memory(found, trained, recorded, needed - 1)
    assert "fused code holds less" in check_memory(found, trained, dataclasses.replace(chosen, backend="inductor"), needed - 1)
    gm.shutdown()
