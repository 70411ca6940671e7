"""Everything that can be wrong with the options and files of a run, found in seconds and before anything is compiled."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler
from diffusers.optimization import SchedulerType

from lora_trainer.buckets import Size
from lora_trainer.cache import Cache, Takes, open_cache
from lora_trainer.families import Family, family_of
from lora_trainer.objectives import Diffusion, FlowMatching, Objective
from lora_trainer.settings import Settings, check_same_run
from squareq_fx.checkpoint import latest_checkpoint
from squareq_fx.errors import SquareQError
from squareq_fx.lora import Lora
from squareq_fx.lowering.backends import check_backend
from squareq_fx.slab.paths import SlabPaths

__all__ = ["Plan", "prepare"]


@dataclass(frozen=True)
class Plan:
    """What the options of a run mean.

    Attributes:
        sample_size: (width, height) of the pictures drawn while training.
        checkpoint: to go on from.
    """

    family: Family
    cache: Cache
    lora: Lora
    objective: Objective
    prediction: str
    sample_size: Size
    checkpoint: Path | None


def prepare(settings: Settings) -> Plan:
    """Look at everything but the weights.

    Raises:
        SquareQError: options, files or packages that do not go together; options are listed all at once.
    """
    family = family_of(settings.pipeline)
    config = family.config(settings.pipeline)
    lora = Lora(rank=settings.rank, alpha=settings.alpha, targets=_targets(settings.targets))
    problems = [*_numbers(settings), *_packages(settings), *_device(settings), *_slab(settings)]
    if problems:
        raise SquareQError("\n  - ".join(["these options cannot be:", *problems]))
    objective, prediction = _objective(settings, family)
    checkpoint = _checkpoint(settings)
    takes = family.takes(config)
    cache = open_cache(settings.cache, takes)
    return Plan(family, cache, lora, objective, prediction, _sample_size(settings, cache, takes), checkpoint)


def _targets(text: str) -> str | tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",")) if "," in text else text


def _numbers(settings: Settings) -> Iterator[str]:
    for name in ("steps", "batch_size", "accumulate", "keep", "sample_steps"):
        if getattr(settings, name) < 1:
            yield f"--{name.replace('_', '-')} must be at least 1, not {getattr(settings, name)}"
    for name in ("warmup", "clip_norm", "weight_decay", "sample_every", "checkpoint_every", "workers"):
        if getattr(settings, name) < 0:
            yield f"--{name.replace('_', '-')} must not be negative, not {getattr(settings, name)}"
    for name in ("lr", "logit_std", "min_snr", "budget_gib"):
        value = getattr(settings, name)
        if value is not None and not value > 0:
            yield f"--{name.replace('_', '-')} must be positive, not {value}"
    if settings.ema is not None and not 0 <= settings.ema < 1:
        yield f"--ema must be at least 0 and below 1, not {settings.ema}"
    if settings.lr_scheduler not in {kind.value for kind in SchedulerType}:
        yield f"--lr-scheduler {settings.lr_scheduler!r} is none of {', '.join(kind.value for kind in SchedulerType)}"


def _packages(settings: Settings) -> Iterator[str]:
    if settings.optimizer == "adamw8bit" and importlib.util.find_spec("bitsandbytes") is None:
        yield "--optimizer adamw8bit: `pip install bitsandbytes`, or take adamw"
    if settings.tensorboard and importlib.util.find_spec("tensorboard") is None:
        yield "TensorBoard is not installed: `pip install tensorboard`, or give --no-tensorboard"


def _device(settings: Settings) -> Iterator[str]:
    try:
        torch.empty(0, device=settings.device)
    except (RuntimeError, AssertionError) as error:
        yield f"--device {settings.device}: {str(error).splitlines()[0]}"
        return
    try:
        check_backend(settings.backend, settings.device)
    except SquareQError as error:
        yield f"--backend {settings.backend}: {error}"


def _slab(settings: Settings) -> Iterator[str]:
    if not settings.build_slab and not SlabPaths.of(settings.slab).data.is_file():
        yield f"the slab {settings.slab} is not there: give --build-slab to build it from the pipeline, which is done once"


def _objective(settings: Settings, family: Family) -> tuple[Objective, str]:
    chosen = settings.objective
    if chosen == "auto":
        chosen = "flow" if family.name == "flux" else _ddpm(settings).config["prediction_type"]
    if (chosen == "flow") != (family.name == "flux"):
        raise SquareQError(f"--objective {chosen}: Flux is trained with flow, SDXL with epsilon or v_prediction")
    if chosen == "flow":
        if settings.min_snr is not None:
            raise SquareQError("--min-snr weighs epsilon and v_prediction; for flow choose where times are drawn instead")
        mean, std, shift = settings.logit_mean, settings.logit_std, _shift(settings.shift)
        return FlowMatching(settings.timestep_sampling, mean, std, shift), chosen
    return Diffusion(_ddpm(settings, prediction_type=chosen), settings.min_snr), chosen


def _ddpm(settings: Settings, **changes: Any) -> Any:
    path = settings.pipeline / "scheduler"
    if not path.is_dir():
        raise SquareQError(f"{path} is missing: the noise schedule of the model is not known")
    return DDPMScheduler.from_pretrained(path, local_files_only=True, **changes)


def _shift(text: str) -> float | None:
    if text == "resolution":
        return None
    try:
        shift = float(text)
    except ValueError:
        shift = 0.0
    if not shift > 0:
        raise SquareQError(f"--shift is a positive number, or `resolution`, not {text!r}")
    return shift


def _checkpoint(settings: Settings) -> Path | None:
    checkpoint = latest_checkpoint(settings.output)
    if checkpoint is not None and not settings.resume:
        raise SquareQError(f"{settings.output} holds {checkpoint.name}: give --resume to go on, or another output")
    if checkpoint is not None:
        check_same_run(settings)
    return checkpoint


def _sample_size(settings: Settings, cache: Cache, takes: Takes) -> Size:
    buckets = [entry.bucket for entry in cache.samples if entry.bucket is not None]
    size = max(sorted(set(buckets)), key=buckets.count)
    if settings.sample_size is not None:
        match = re.fullmatch(r"(\d+)x(\d+)", settings.sample_size)
        if match is None:
            raise SquareQError(f"--sample-size is WIDTHxHEIGHT, not {settings.sample_size!r}")
        size = (int(match[1]), int(match[2]))
        multiple = takes.latent_multiple * (buckets[0][0] // cache.samples[0].shapes["latents"][2])
        if not all(side and side % multiple == 0 for side in size):
            raise SquareQError(f"--sample-size {settings.sample_size}: both sides must be multiples of {multiple}")
    if settings.sample_every:
        missing = [name for name in ("vae", "scheduler") if not (settings.pipeline / name).is_dir()]
        if missing:
            raise SquareQError(f"--sample-every needs {' and '.join(missing)} in {settings.pipeline}")
        if not any(entry.caption for entry in cache.prompts):
            raise SquareQError(f"--sample-every: {settings.cache} has no prompts; run cache_latents.py again with --prompt")
    return size
