"""Every option of the trainer: its type, its default, its line of help. The command line is made from this class."""

from __future__ import annotations

import json
import os
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from typer import Argument, Option

from squareq_fx.errors import SquareQError

__all__ = ["Settings", "check_same_run", "write_settings"]

_CUDA = torch.cuda.is_available()


@dataclass(frozen=True)
class Settings:
    """The options of one run."""

    pipeline: Annotated[Path, Argument(help="a pipeline directory of SDXL or Flux: config, scheduler and VAE")]
    cache: Annotated[Path, Argument(help="what cache_latents.py made with that pipeline")]
    output: Annotated[Path, Argument(help="where adapter, checkpoints, pictures and logs go")]
    slab: Annotated[Path, Option(help="the model's INT8 slab, a path without suffix")]
    build_slab: Annotated[bool, Option(help="build the slab from the pipeline if it is not there")] = False

    rank: Annotated[int, Option(help="of the adapters")] = 16
    alpha: Annotated[float | None, Option(help="the adapters are scaled by alpha / rank; default: rank")] = None
    targets: Annotated[str, Option(help="attention, attention+ff, all, a regular expression, or suffixes with commas")] = (
        "attention"
    )

    objective: Annotated[
        Literal["auto", "flow", "epsilon", "v_prediction"], Option(help="auto: flow for Flux, as its scheduler says for SDXL")
    ] = "auto"
    timestep_sampling: Annotated[Literal["uniform", "logit-normal"], Option(help="flow: how times are drawn")] = "logit-normal"
    logit_mean: Annotated[float, Option(help="flow: mean of the normal variable")] = 0.0
    logit_std: Annotated[float, Option(help="flow: its standard deviation")] = 1.0
    shift: Annotated[str, Option(help="flow: moves times towards noise; a number, or resolution for Flux's own")] = "1"
    guidance: Annotated[float, Option(help="flow: the guidance scale a distilled model is told")] = 1.0
    min_snr: Annotated[float | None, Option(help="epsilon, v_prediction: gamma of min-SNR weighting, about 5")] = None

    steps: Annotated[int, Option(help="optimizer steps")] = 1000
    batch_size: Annotated[int, Option(help="samples a forward, all of one resolution")] = 1
    accumulate: Annotated[int, Option(help="batches an optimizer step")] = 1
    seed: Annotated[int, Option(help="of everything that is drawn")] = 0
    lr: Annotated[float, Option(help="learning rate")] = 1e-4
    lr_scheduler: Annotated[str, Option(help="a name diffusers.optimization.get_scheduler knows")] = "constant_with_warmup"
    warmup: Annotated[int, Option(help="steps until the full learning rate")] = 0
    optimizer: Annotated[Literal["adamw", "adamw8bit"], Option(help="adamw8bit needs bitsandbytes")] = "adamw"
    weight_decay: Annotated[float, Option(help="of AdamW")] = 0.01
    clip_norm: Annotated[float, Option(help="largest norm of the gradient; 0 clips nothing")] = 1.0
    ema: Annotated[float | None, Option(help="decay of a moving average of the adapters, which is then what is saved")] = None

    sample_every: Annotated[int, Option(help="steps between sample pictures; 0 draws none")] = 0
    sample_steps: Annotated[int, Option(help="denoising steps a picture")] = 28
    sample_guidance: Annotated[float | None, Option(help="default: 5 for SDXL, 3.5 for Flux")] = None
    sample_size: Annotated[str | None, Option(help="WIDTHxHEIGHT; default: the cache's most frequent bucket")] = None
    checkpoint_every: Annotated[int, Option(help="steps between checkpoints; 0 makes one at the end")] = 250
    keep: Annotated[int, Option(help="checkpoints to keep")] = 2
    resume: Annotated[bool, Option(help="go on from the newest checkpoint in the output, if there is one")] = False

    device: Annotated[str, Option(help="cpu, cuda, cuda:1")] = "cuda" if _CUDA else "cpu"
    dtype: Annotated[Literal["float32", "bfloat16", "float16"], Option(help="that the model computes in")] = (
        "bfloat16" if _CUDA else "float32"
    )
    compute: Annotated[
        Literal["w8a16", "w8a8", "auto"], Option(help="what layers multiply: 16-bit or INT8 activations, or what is faster")
    ] = "w8a16"
    backend: Annotated[
        Literal["eager", "inductor", "cudagraph", "eager+cudagraph"],
        Option(help="how blocks run; on a card cudagraph is the fastest, and eager+cudagraph the fastest to begin"),
    ] = "eager"
    save: Annotated[
        Literal["recompute", "save", "offload"], Option(help="activations of a block: made again, kept, or sent to the host")
    ] = "recompute"
    backing: Annotated[Literal["host", "disk", "resident"], Option(help="where weights wait for their turn")] = "host"
    budget_gib: Annotated[float | None, Option(help="most GiB of the device that weights take")] = None
    workers: Annotated[int, Option(help="processes that read the cache")] = 0
    tensorboard: Annotated[bool, Option(help="write logs for TensorBoard into the output")] = True


_MAY_DIFFER = {
    *("pipeline", "cache", "output", "slab", "build_slab"),
    *("sample_every", "sample_steps", "sample_guidance", "sample_size", "checkpoint_every", "keep", "resume"),
    *("steps", "device", "backing", "budget_gib", "workers", "tensorboard"),
}
"""What may change when a run is resumed. A cache that is not the run's is found out by its own fingerprint; with other steps, a
learning rate schedule that depends on them goes on as if it had always been so."""


def write_settings(settings: Settings) -> None:
    """Into `settings.json` of the output, whole or not at all."""
    settings.output.mkdir(parents=True, exist_ok=True)
    path = settings.output / "settings.json"
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(_plain(settings), indent=1) + "\n", encoding="utf-8")
    os.replace(partial, path)


def check_same_run(settings: Settings) -> None:
    """Compare with the settings of the run that is to be resumed.

    Raises:
        SquareQError: one that decides the result differs; all of them are listed.
    """
    path = settings.output / "settings.json"
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SquareQError(f"{path} cannot be read, so nobody knows what run this was: {error}") from error
    now = {name: value for name, value in _plain(settings).items() if name not in _MAY_DIFFER}
    # An option that an older run did not have had its default.
    before = {field.name: field.default for field in fields(settings) if field.default is not MISSING} | before
    differing = [name for name, value in now.items() if before.get(name) != value]
    if differing:
        lines = [f"{name} was {before.get(name)!r} and is {now[name]!r}" for name in differing]
        raise SquareQError("\n  - ".join([f"{settings.output} is another run; repeat its options or begin a new one:", *lines]))


def _plain(settings: Settings) -> dict[str, Any]:
    return {name: str(value) if isinstance(value, Path) else value for name, value in asdict(settings).items()}
