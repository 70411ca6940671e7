"""Trains a LoRA of SDXL or Flux on an INT8 base that is streamed block by block, from what cache_latents.py made.

    python examples/cache_latents.py PIPELINE IMAGES CACHE --prompt "a cat asleep on a piano"
    python examples/train_lora.py PIPELINE CACHE OUTPUT --slab out/flux_int8 --build-slab

The float model is never loaded: its config and the slab are enough. OUTPUT gets `pytorch_lora_weights.safetensors`, which
diffusers loads, besides checkpoints, sample pictures and logs. A run that was killed goes on with --resume, and on a CPU ends
with the same bytes as one that was not.
"""

from __future__ import annotations

import contextlib
import inspect
import math
import random
import sys
from collections.abc import Iterator
from typing import Any, get_type_hints

import numpy as np
import torch
import typer
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from lora_trainer.data import Batches
from lora_trainer.memory import check_memory, forecast_run
from lora_trainer.objectives import loss_of
from lora_trainer.preparing import Plan, prepare
from lora_trainer.reporting import Reporter, bucket_table
from lora_trainer.sampling import draw
from lora_trainer.settings import Settings, write_settings
from rich.console import Console
from rich.markup import escape

import squareq_fx
from squareq_fx.checkpoint import load_checkpoint, save_checkpoint
from squareq_fx.errors import SquareQError
from squareq_fx.families import family_inputs
from squareq_fx.slab.paths import SlabPaths

console = Console()


def train(settings: Settings) -> None:
    """One run, from the options to the saved adapter.

    Raises:
        SquareQError: something is wrong with options or files, before anything is compiled; or the loss is no longer finite.
    """
    plan = prepare(settings)
    console.print(bucket_table(plan.cache.samples, settings.batch_size))
    _seed(settings.seed)
    gm = compile_model(settings, plan)
    parameters = [parameter for parameter in gm.parameters() if parameter.requires_grad]
    trained = sum(p.numel() for p in parameters)
    console.print(f"{len(parameters)} tensors to train, {trained:,} numbers")
    console.print(check_memory(forecast_run(gm, settings, plan), trained, settings, free_memory(gm.device)))

    optimizer = make_optimizer(settings, parameters)
    scheduler = get_scheduler(
        settings.lr_scheduler, optimizer, num_warmup_steps=settings.warmup, num_training_steps=settings.steps
    )
    ema = None if settings.ema is None else EMAModel(parameters, decay=settings.ema)
    batches = Batches(plan.cache.samples, batch_size=settings.batch_size, seed=settings.seed, workers=settings.workers)
    run: dict[str, Any] = {
        "module": gm,
        "optimizer": optimizer,
        "scheduler": scheduler,
        "ema": ema,
        "extra": {"batches": batches},
    }
    first = 0
    if plan.checkpoint is not None:
        first = load_checkpoint(plan.checkpoint, **run)
        console.print(f"resumed after step {first}")
    write_settings(settings)

    source = iter(batches)
    logs = settings.output / "tensorboard" if settings.tensorboard else None
    with Reporter(console, steps=settings.steps, first=first, logs=logs) as report:
        for step in range(first + 1, settings.steps + 1):
            loss = sum(backward(gm, next(source), settings, plan) for _ in range(settings.accumulate))
            if not math.isfinite(loss):
                raise SquareQError(f"the loss of step {step} is {loss}; begin a new run with a lower --lr")
            norm = torch.nn.utils.clip_grad_norm_(parameters, settings.clip_norm or math.inf)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            scalars = {"lr": float(scheduler.get_last_lr()[0]), "grad_norm": norm.item(), "epoch": batches.epoch}
            scheduler.step()
            if ema is not None:
                ema.step(parameters)
            report.step(step, loss, scalars | peak_memory(gm.device))
            if settings.sample_every and step % settings.sample_every == 0:
                with averaged(ema, parameters):
                    report.pictures(step, sample(gm, settings, plan), settings.output / "samples")
            if step == settings.steps or (settings.checkpoint_every and step % settings.checkpoint_every == 0):
                save_checkpoint(settings.output, step=step, keep=settings.keep, **run)

    with averaged(ema, parameters):
        gm.save_lora_adapter(settings.output, format="diffusers")
    console.print(f"saved {settings.output / 'pytorch_lora_weights.safetensors'}", soft_wrap=True)


def compile_model(settings: Settings, plan: Plan) -> Any:
    """The model with trainable adapters; the slab is built if it is missing, which `prepare` has asked about."""
    if not SlabPaths.of(settings.slab).data.is_file():
        squareq_fx.build_slab(settings.pipeline / plan.family.backbone, settings.slab)
    model = plan.family.skeleton(settings.pipeline, getattr(torch, settings.dtype))
    inputs = family_inputs(model)  # in the model's dtype; those that the slab recorded have that of the stored weights
    return squareq_fx.compile(
        model,
        settings.slab,
        example_inputs=None if inputs is None else inputs.kwargs,
        lora=plan.lora,
        compute=settings.compute,
        backend=settings.backend,
        save=settings.save,
        device=settings.device,
        backing=settings.backing,
        budget=None if settings.budget_gib is None else int(settings.budget_gib * 2**30),
    )


def backward(gm: Any, batch: dict[str, torch.Tensor], settings: Settings, plan: Plan) -> float:
    """Forward and backward of one batch; its share of the step's loss. Gradients add up over the batches of a step."""
    batch = {name: tensor.to(gm.device) for name, tensor in batch.items()}
    noised = plan.objective.noised(batch.pop("latents").float())
    inputs = {name: tensor.to(gm.dtype) for name, tensor in batch.items()}
    prediction = plan.family.predict(gm, noised.sample.to(gm.dtype), noised.timesteps, inputs, settings.guidance)
    loss = loss_of(prediction, noised) / settings.accumulate
    loss.backward()
    return loss.item()


def sample(gm: Any, settings: Settings, plan: Plan) -> list[Any]:
    """Pictures of the cached prompts."""
    return draw(
        gm,
        plan.family,
        settings.pipeline,
        plan.cache,
        size=plan.sample_size,
        steps=settings.sample_steps,
        guidance=settings.sample_guidance,
        prediction=plan.prediction,
        seed=settings.seed,
    )


def make_optimizer(settings: Settings, parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """AdamW (arXiv 1711.05101), with its state in 8 bits (arXiv 2110.02861) if that is asked for."""
    options: dict[str, Any] = {"lr": settings.lr, "weight_decay": settings.weight_decay}
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(parameters, **options)
    import bitsandbytes

    return bitsandbytes.optim.AdamW8bit(parameters, **options)


@contextlib.contextmanager
def averaged(ema: EMAModel | None, parameters: list[torch.nn.Parameter]) -> Iterator[None]:
    """In here the adapters are their moving average, if there is one."""
    if ema is None:
        yield
        return
    ema.store(parameters)
    ema.copy_to(parameters)
    try:
        yield
    finally:
        ema.restore(parameters)


def peak_memory(device: torch.device) -> dict[str, float]:
    """The most GiB torch had at once on a CUDA device."""
    return {"peak_gib": torch.cuda.max_memory_allocated(device) / 2**30} if device.type == "cuda" else {}


def free_memory(device: torch.device) -> int | None:
    """Bytes of a CUDA device that this process can still have, those its allocator keeps included."""
    if device.type != "cuda":
        return None
    return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)


def _seed(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def main(**options: Any) -> None:
    """Train a LoRA of SDXL or Flux on an INT8 base that is streamed block by block."""
    try:
        train(Settings(**options))
    except SquareQError as error:
        console.print(f"[red]error:[/] {escape(str(error))}", soft_wrap=True)
        sys.exit(1)


# The command line is the fields of Settings.
main.__signature__ = inspect.signature(Settings, eval_str=True)  # type: ignore[attr-defined]
main.__annotations__ = dict(get_type_hints(Settings, include_extras=True))

if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_show_locals=False)
    app.command()(main)
    app()
