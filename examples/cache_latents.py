"""Turns a folder of pictures and captions into latents and embeddings that train_lora.py reads.

    python examples/cache_latents.py PIPELINE IMAGES CACHE --prompt "a cat asleep on a piano"

PIPELINE is a directory that `save_pretrained` wrote, of SDXL or Flux; only its VAE, text encoders and tokenizers are loaded.
IMAGES holds pictures, each with a .txt of the same name beside it. A second run makes only what is missing or has changed, and
removes what no picture stands for any more; a run that was killed is simply started again.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
import xxhash
from lora_trainer.buckets import Size, crop_to, make_buckets, nearest_bucket
from lora_trainer.cache import PROMPTS, entry_metadata, find_entries, read_entry, write_entry
from lora_trainer.families import Family, family_of
from lora_trainer.pictures import Picture, find_pictures, load_pixels, to_latents
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from squareq_fx.errors import SquareQError

app = typer.Typer(add_completion=False, pretty_exceptions_show_locals=False)
console = Console()

_ENCODERS = ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
_SAMPLED_BYTES = 1 << 20


@dataclass(frozen=True)
class Task:
    """One file to make: of a picture in a bucket, or of a prompt, if there is no picture."""

    target: Path
    caption: str
    source: str
    picture: Picture | None = None
    bucket: Size | None = None


@app.command()
def main(
    pipeline: Annotated[Path, typer.Argument(help="a pipeline directory of SDXL or Flux, with VAE and text encoders")],
    images: Annotated[Path, typer.Argument(help="pictures, with captions in .txt files beside them")],
    cache: Annotated[Path, typer.Argument(help="where the cache goes; a directory of its own")],
    prompt: Annotated[list[str] | None, typer.Option(help="draw this one while training; repeatable")] = None,
    default_caption: Annotated[str | None, typer.Option(help="of pictures that have no .txt")] = None,
    resolution: Annotated[int, typer.Option(help="side of the square bucket, in pixels")] = 1024,
    bucket_step: Annotated[int, typer.Option(help="sides of buckets are multiples of this")] = 64,
    max_aspect: Annotated[float, typer.Option(help="longer side by shorter side of a bucket, at most")] = 2.0,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1")] = "cuda" if torch.cuda.is_available() else "cpu",
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"], typer.Option(help="of the text encoders; the VAE is float32")
    ] = "bfloat16",
) -> None:
    """Encode pictures and captions once, so that training needs neither VAE nor text encoders."""
    try:
        family = family_of(pipeline)
        buckets = make_buckets(resolution, bucket_step, max_aspect)
        pictures = find_pictures(images, default_caption)
        common = f"{family.name} {dtype} {_pipeline_fingerprint(pipeline)}"
        tasks = [
            *(_picture_task(picture, images, cache, buckets, common) for picture in pictures),
            *(_prompt_task(i, text, cache, common) for i, text in enumerate(["", *(prompt or [])])),
        ]
        removed = _remove_others(cache, {task.target for task in tasks})
        missing = [task for task in tasks if not _is_done(task)]
        if missing:
            _make(missing, family, family.load_encoders(pipeline, getattr(torch, dtype)).to(device), torch.device(device))
    except SquareQError as error:
        console.print(f"[red]error:[/] {escape(str(error))}", soft_wrap=True)
        sys.exit(1)
    used = {task.bucket for task in tasks if task.bucket is not None}
    small = sum(crop_to(p.size, nearest_bucket(p.size, buckets)).resized[0] > p.size[0] for p in pictures)
    console.print(
        f"{len(pictures)} pictures in {len(used)} buckets; {len(missing)} files made, {len(tasks) - len(missing)} were there, "
        f"{removed} removed; {small} pictures are smaller than their bucket and were enlarged",
        soft_wrap=True,
    )


def _picture_task(picture: Picture, images: Path, cache: Path, buckets: list[Size], common: str) -> Task:
    name = picture.path.relative_to(images)
    bucket = nearest_bucket(picture.size, buckets)
    content = xxhash.xxh3_128_hexdigest(picture.path.read_bytes())
    source = f"{common} {bucket} {content} {picture.caption}"
    return Task(cache / name.with_name(name.name + ".safetensors"), picture.caption, _digest(source), picture, bucket)


def _prompt_task(index: int, text: str, cache: Path, common: str) -> Task:
    return Task(cache / PROMPTS / f"{index:03}.safetensors", text, _digest(f"{common} {text}"))


def _digest(text: str) -> str:
    return xxhash.xxh3_128_hexdigest(text.encode())


def _pipeline_fingerprint(pipeline: Path) -> str:
    """Of everything that encodes. Of a large file its size, beginning and end, which is enough to tell two models apart."""
    digest = xxhash.xxh3_128()
    for path in sorted(path for name in _ENCODERS for path in (pipeline / name).rglob("*") if path.is_file()):
        size = path.stat().st_size
        digest.update(f"{path.relative_to(pipeline)} {size}\n".encode())
        with open(path, "rb") as file:
            digest.update(file.read(_SAMPLED_BYTES))
            file.seek(max(0, size - _SAMPLED_BYTES))
            digest.update(file.read())
    return digest.hexdigest()


def _remove_others(cache: Path, wanted: set[Path]) -> int:
    """Files of this cache that no picture or prompt stands for any more."""
    others = [path for path in find_entries(cache) if path not in wanted]
    for path in others:
        read_entry(path)  # raises if it is not ours to remove
    for path in others:
        path.unlink()
    return len(others)


def _is_done(task: Task) -> bool:
    return task.target.is_file() and read_entry(task.target).source == task.source


@torch.no_grad()
def _make(tasks: list[Task], family: Family, pipeline: Any, device: torch.device) -> None:
    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("", total=len(tasks))
        for task in tasks:
            progress.update(bar, description=escape(task.target.name))
            tensors = {name: value[0] for name, value in family.encode_prompts(pipeline, [task.caption], device).items()}
            if task.picture is not None and task.bucket is not None:
                crop = crop_to(task.picture.size, task.bucket)
                tensors["latents"] = to_latents(pipeline.vae, load_pixels(task.picture, crop, task.bucket))[0]
                width, height = task.picture.size
                tensors |= family.conditions((height, width), (crop.top, crop.left), (task.bucket[1], task.bucket[0]))
            broken = [name for name, value in tensors.items() if not value.isfinite().all()]
            if broken:
                raise SquareQError(f"{task.target.name}: {', '.join(broken)} has NaN or Inf; try --dtype float32")
            metadata = entry_metadata(family=family.name, caption=task.caption, source=task.source, bucket=task.bucket)
            write_entry(task.target, tensors, metadata)
            progress.advance(bar)


if __name__ == "__main__":
    app()
