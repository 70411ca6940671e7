"""Pictures while it trains: a diffusers pipeline around the model that is being trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import safetensors.torch
import torch
from diffusers import AutoencoderKL
from PIL import Image

from lora_trainer.buckets import Size
from lora_trainer.cache import Cache, Entry
from lora_trainer.families import Batch, Family
from lora_trainer.pictures import from_latents

__all__ = ["draw"]

_GUIDANCE = {"sdxl": 5.0, "flux": 3.5}


@torch.no_grad()
def draw(
    model: Any,
    family: Family,
    pipeline_dir: Path,
    cache: Cache,
    *,
    size: Size,
    steps: int,
    guidance: float | None,
    prediction: str,
    seed: int,
) -> list[Image.Image]:
    """One picture for each prompt of the cache but the empty one; the random numbers of the training are not touched.

    The VAE is on the device only in here, in float32.

    Args:
        prediction: what the model was trained to answer; for SDXL it overrides the scheduler's config.
        seed: the same noise for every prompt, and at every call.
    """
    vae = AutoencoderKL.from_pretrained(pipeline_dir / "vae", local_files_only=True, torch_dtype=torch.float32)
    changes = {} if prediction == "flow" else {"prediction_type": prediction}
    pipeline = family.assemble(model, vae.to(model.device), _scheduler(pipeline_dir, changes))
    pipeline.set_progress_bar_config(disable=True)
    empty = next((_embeddings(entry, model) for entry in cache.prompts if not entry.caption), {})
    pictures: list[Image.Image] = []
    for entry in cache.prompts:
        if entry.caption:
            latents = family.sample(
                pipeline,
                _embeddings(entry, model),
                empty,
                width=size[0],
                height=size[1],
                num_inference_steps=steps,
                guidance_scale=_GUIDANCE[family.name] if guidance is None else guidance,
                generator=torch.Generator().manual_seed(seed),
            )
            pictures += from_latents(vae, latents)
    return pictures


def _embeddings(entry: Entry, model: Any) -> Batch:
    tensors = safetensors.torch.load_file(entry.path)
    return {name: tensor.unsqueeze(0).to(model.device, model.dtype) for name, tensor in tensors.items()}


def _scheduler(pipeline_dir: Path, changes: dict[str, Any]) -> Any:
    config = json.loads((pipeline_dir / "scheduler" / "scheduler_config.json").read_text(encoding="utf-8"))
    return getattr(diffusers, config["_class_name"]).from_config(config, **changes)
