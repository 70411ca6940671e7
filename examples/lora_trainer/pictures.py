"""Pictures and captions in a folder, and the VAE between pictures and latents."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from lora_trainer.buckets import Crop, Size
from squareq_fx.errors import SquareQError

__all__ = ["Picture", "find_pictures", "from_latents", "load_pixels", "to_latents"]

_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
_ORIENTATION = 0x0112


@dataclass(frozen=True)
class Picture:
    """A picture and what it shows; `size` is (width, height) as it is meant to be seen."""

    path: Path
    caption: str
    size: Size


def find_pictures(directory: Path, default_caption: str | None = None) -> list[Picture]:
    """All pictures below a folder, each with the text of the .txt file beside it.

    Args:
        default_caption: for pictures without such a file.

    Raises:
        SquareQError: there are none, one cannot be read, or has no caption; all of them are listed.
    """
    paths = sorted(path for path in directory.rglob("*") if path.suffix.lower() in _SUFFIXES)
    if not paths:
        raise SquareQError(f"{directory} holds no pictures ({', '.join(sorted(_SUFFIXES))})")
    found, problems = [], []
    for path in paths:
        text = path.with_suffix(".txt")
        caption = " ".join(text.read_text(encoding="utf-8").split()) if text.is_file() else default_caption
        if caption is None:
            problems.append(f"{path} has no caption: write {text.name} beside it, or give --default-caption")
            continue
        try:
            with Image.open(path) as image:
                sideways = image.getexif().get(_ORIENTATION, 1) >= 5
                width, height = image.size
        except (OSError, UnidentifiedImageError) as error:
            problems.append(f"{path} is not a readable picture: {error}")
            continue
        found.append(Picture(path, caption, (height, width) if sideways else (width, height)))
    if problems:
        raise SquareQError("\n  - ".join([f"{directory}: not every picture can be used", *problems]))
    return found


def load_pixels(picture: Picture, crop: Crop, bucket: Size) -> torch.Tensor:
    """[1, 3, height, width] float32 in [-1, 1], resized and cut; what is transparent becomes white.

    Raises:
        SquareQError: the picture is damaged.
    """
    try:
        with Image.open(picture.path) as file:
            image = ImageOps.exif_transpose(file)
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            image = image.convert("RGB").resize(crop.resized, Image.Resampling.LANCZOS)
    except (OSError, SyntaxError, ValueError) as error:
        raise SquareQError(f"{picture.path} is damaged: {error}") from error
    image = image.crop((crop.left, crop.top, crop.left + bucket[0], crop.top + bucket[1]))
    return torch.from_numpy(np.asarray(image, dtype=np.float32) / 127.5 - 1).permute(2, 0, 1).unsqueeze(0)


@torch.no_grad()
def to_latents(vae: Any, pixels: torch.Tensor) -> torch.Tensor:
    """Latents as the model wants them, the mode of the VAE's distribution: [batch, channels, height, width] float32."""
    shift, scale = _normalisation(vae)
    return (vae.encode(pixels.to(vae.device)).latent_dist.mode() - shift) * scale


@torch.no_grad()
def from_latents(vae: Any, latents: torch.Tensor) -> Iterator[Image.Image]:
    """The pictures of latents that are normalised as `to_latents` does."""
    shift, scale = _normalisation(vae)
    for single in latents.to(vae.device, torch.float32).split(1):
        pixels = vae.decode(single / scale + shift, return_dict=False)[0].squeeze(0)
        levels = pixels.add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8)
        yield Image.fromarray(levels.permute(1, 2, 0).cpu().numpy())


def _normalisation(vae: Any) -> tuple[Any, Any]:
    """(latents - shift) * scale, by the VAE's config: per channel, or one number each."""
    config = vae.config
    if config.get("latents_mean") and config.get("latents_std"):
        mean, std = (torch.tensor(config[name], device=vae.device) for name in ("latents_mean", "latents_std"))
        return mean.view(1, -1, 1, 1), config["scaling_factor"] / std.view(1, -1, 1, 1)
    return config.get("shift_factor") or 0.0, config["scaling_factor"]
