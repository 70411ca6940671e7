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
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open

from lora_trainer.buckets import Size
from squareq_fx.errors import SquareQError

__all__ = ["FORMAT", "PROMPTS", "Cache", "Entry", "find_entries", "open_cache", "read_entry", "write_entry"]

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
class Cache:
    """A cache that was found to be in order."""

    family: str
    samples: tuple[Entry, ...]
    prompts: tuple[Entry, ...]


def write_entry(path: Path, tensors: Mapping[str, torch.Tensor], *, family: str, caption: str, bucket: Size | None, source: str) -> None:
    """Write one file, whole or not at all."""
    metadata = {"format": FORMAT, "family": family, "caption": caption, "source": source}
    if bucket is not None:
        metadata["bucket"] = f"{bucket[0]}x{bucket[1]}"
    content = safetensors.torch.save({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, metadata)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    with open(partial, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


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


def open_cache(directory: Path, shapes: Mapping[str, tuple[int | None, ...]], family: str) -> Cache:
    """Read all headers and check them against the model that is to be trained.

    Args:
        shapes: of the model's family, see `Family.shapes`.
        family: its name.

    Raises:
        SquareQError: the directory is missing or empty, a file is damaged, of another family, or has tensors of other shapes than
            the model takes; all of them are listed.
    """
    paths = find_entries(directory)
    if not paths:
        raise SquareQError(f"{directory} holds no cached samples: run `python examples/cache_latents.py IMAGES {directory}` first")
    problems: list[str] = []
    entries: list[Entry] = []
    for path in paths:
        try:
            entries.append(read_entry(path))
        except SquareQError as error:
            problems.append(str(error))
    counts = collections.Counter(entry.family for entry in entries)
    if set(counts) - {family}:
        found = ", ".join(f"{count} of {name}" for name, count in sorted(counts.items()))
        problems.append(f"the model is {family}, the cache has {found}; make one cache for each family")
    for entry in entries:
        if entry.family == family:
            problems += [f"{entry.path}: {problem}" for problem in _compare(entry, shapes)]
    samples = tuple(entry for entry in entries if entry.bucket is not None)
    if not samples and not problems:
        problems.append("there are prompts, but no picture")
    if problems:
        raise SquareQError("\n  - ".join([f"{directory} cannot be trained on:", *problems]))
    return Cache(family, samples, tuple(entry for entry in entries if entry.bucket is None))


def _compare(entry: Entry, expected: Mapping[str, tuple[int | None, ...]]) -> list[str]:
    """A prompt has no latents and no sizes; all samples of one bucket have latents of one size."""
    wanted = {name: shape for name, shape in expected.items() if entry.bucket is not None or name.endswith("embeds")}
    problems = [f"{name} is missing" for name in wanted if name not in entry.shapes]
    for name, shape in wanted.items():
        found = entry.shapes.get(name, shape)
        if len(found) != len(shape) or any(b is not None and a != b for a, b in zip(found, shape)):
            problems.append(f"{name} is {list(found)}, the model takes {['any' if n is None else n for n in shape]}")
    if entry.bucket is not None and len(latents := entry.shapes.get("latents", ())) == 3:
        width, height = entry.bucket
        if width * latents[1] != height * latents[2] or latents[1] % 2 or latents[2] % 2:
            problems.append(f"latents of {latents[2]}x{latents[1]} do not belong to the bucket {width}x{height}")
    return problems
