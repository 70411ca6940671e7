"""The files between the two scripts: everything a training step needs of a picture, and no picture.

    cache/cat/sleeping.safetensors   latents [channels, height, width] float32, normalised
                                     prompt_embeds [tokens, features], pooled_prompt_embeds [features]
                                     time_ids [6] float32 (SDXL: original height and width, top, left, target height and width)
    cache/prompts/000.safetensors    the two embeddings of a prompt that sample pictures are drawn for; 000 is the empty one

Each file's `__metadata__` names the family, the caption, the bucket and what it was made from.
"""

from __future__ import annotations

import collections
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open

from lora_trainer.buckets import Size
from squareq_fx.errors import SquareQError

__all__ = [
    "PROMPTS",
    "Cache",
    "Entry",
    "Takes",
    "entry_metadata",
    "find_entries",
    "open_cache",
    "read_entry",
    "write_entry",
]

FORMAT = "lora_trainer cache 1"
PROMPTS = "prompts"


@dataclass(frozen=True)
class Entry:
    """One file of the cache, by its header.

    Attributes:
        bucket: (width, height) in pixels; None for a prompt.
        source: fingerprint of all that the file was made from.
        shapes: of its tensors, by name.
    """

    path: Path
    family: str
    caption: str
    bucket: Size | None
    source: str
    shapes: Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Takes:
    """What a model takes.

    Attributes:
        shapes: of the tensors of one sample, by name; None is any size.
        latent_multiple: both sides of the latents are multiples of it.
    """

    family: str
    shapes: Mapping[str, tuple[int | None, ...]]
    latent_multiple: int


@dataclass(frozen=True)
class Cache:
    """A cache that was found to be in order."""

    family: str
    samples: tuple[Entry, ...]
    prompts: tuple[Entry, ...]


def write_entry(path: Path, tensors: Mapping[str, torch.Tensor], entry: Mapping[str, str]) -> None:
    """Write one file, whole or not at all; `entry` is what `entry_metadata` made."""
    content = safetensors.torch.save({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, dict(entry))
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    with open(partial, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def entry_metadata(*, family: str, caption: str, source: str, bucket: Size | None = None) -> dict[str, str]:
    """The `__metadata__` of one file."""
    found = {"format": FORMAT, "family": family, "caption": caption, "source": source}
    return found if bucket is None else {**found, "bucket": f"{bucket[0]}x{bucket[1]}"}


def read_entry(path: Path) -> Entry:
    """The header of one file.

    Raises:
        SquareQError: it is damaged, or not a file of a cache.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise SquareQError(f"{path} cannot be read: {error}; remove it and run cache_latents.py again") from error
    if metadata.get("format") != FORMAT:
        raise SquareQError(f"{path} was not written by cache_latents.py; keep the cache in a directory of its own")
    width, _, height = metadata.get("bucket", "").partition("x")
    bucket = (int(width), int(height)) if height else None
    return Entry(path, metadata["family"], metadata["caption"], bucket, metadata["source"], shapes)


def find_entries(directory: Path) -> list[Path]:
    """The files of a cache, samples and prompts, in the order of their names."""
    return sorted(path for path in directory.rglob("*.safetensors") if not path.name.startswith("."))


def open_cache(directory: Path, takes: Takes) -> Cache:
    """Read all headers and check them against the model that is to be trained.

    Raises:
        SquareQError: the directory is missing or empty; a file is damaged, of another family, or holds tensors that the
            model does not take. All of them are listed.
    """
    paths = find_entries(directory)
    if not paths:
        raise SquareQError(f"{directory} holds no cached samples; run `cache_latents.py PIPELINE IMAGES {directory}` first")
    problems: list[str] = []
    entries: list[Entry] = []
    for path in paths:
        try:
            entries.append(read_entry(path))
        except SquareQError as error:
            problems.append(str(error))
    counts = collections.Counter(entry.family for entry in entries)
    if set(counts) - {takes.family}:
        found = ", ".join(f"{count} of {name}" for name, count in sorted(counts.items()))
        problems.append(f"the model is {takes.family}, the cache has {found}; make one cache for each family")
    entries = [entry for entry in entries if entry.family == takes.family]
    for entry in entries:
        problems += [f"{entry.path}: {problem}" for problem in _compare(entry, takes)]
    if not problems:
        problems += _compare_all(entries)
    if problems:
        raise SquareQError("\n  - ".join([f"{directory} cannot be trained on:", *problems]))
    samples = tuple(entry for entry in entries if entry.bucket is not None)
    return Cache(takes.family, samples, tuple(entry for entry in entries if entry.bucket is None))


def _compare(entry: Entry, takes: Takes) -> list[str]:
    """A prompt is embeddings only."""
    wanted = {name: shape for name, shape in takes.shapes.items() if entry.bucket is not None or name.endswith("embeds")}
    problems = [f"{name} is missing" for name in wanted if name not in entry.shapes]
    for name, shape in wanted.items():
        found = entry.shapes.get(name, shape)
        if len(found) != len(shape) or any(b is not None and a != b for a, b in zip(found, shape)):
            problems.append(f"{name} is {list(found)}, the model takes {['any' if n is None else n for n in shape]}")
    if entry.bucket is not None and not problems:
        (width, height), (_, rows, columns) = entry.bucket, entry.shapes["latents"]
        if width % columns or height % rows or width // columns != height // rows:
            problems.append(f"latents of {columns}x{rows} do not belong to the bucket {width}x{height}")
        if rows % takes.latent_multiple or columns % takes.latent_multiple:
            problems.append(f"latents of {columns}x{rows}: the model takes multiples of {takes.latent_multiple}")
    return problems


def _compare_all(entries: list[Entry]) -> Iterator[str]:
    samples = [entry for entry in entries if entry.bucket is not None]
    if not samples:
        yield "there are prompts, but no picture"
    scales = {entry.bucket[0] // entry.shapes["latents"][2] for entry in samples if entry.bucket is not None}
    if len(scales) > 1:
        yield f"latents were made by different VAEs: of 1/{', 1/'.join(map(str, sorted(scales)))} of the picture's size"
    lengths = {entry.shapes["prompt_embeds"][0] for entry in samples}
    if len(lengths) > 1:
        yield f"embeddings of {', '.join(map(str, sorted(lengths)))} tokens cannot be in one batch; cache all with one pipeline"
