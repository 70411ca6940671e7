"""The directory of a run: which checkpoints are in it, and how one comes in or goes at once."""

from __future__ import annotations

import json
import os
import re
import shutil
import warnings
from pathlib import Path
from typing import Any

import xxhash

from squareq_fx.durable import sync
from squareq_fx.errors import SquareQError

__all__ = [
    "ADAPTERS",
    "STATE",
    "TENSORS",
    "VERSION",
    "fingerprint",
    "install",
    "latest_checkpoint",
    "make_room",
    "remove_older",
    "write",
]

VERSION = 1
ADAPTERS, TENSORS, STATE = "adapters.safetensors", "state.safetensors", "state.json"
_NAME = re.compile(r"checkpoint-(\d+)")


def latest_checkpoint(directory: str | os.PathLike[str]) -> Path | None:
    """The newest whole checkpoint in `directory`, None if there is none; warns of those it passes over."""
    for _, path in _checkpoints(Path(directory)):
        if _is_whole(path):
            return path
        warnings.warn(f"{path} is not whole and is passed over", UserWarning, stacklevel=2)
    return None


def make_room(directory: Path, step: int) -> Path:
    """An empty directory to write the checkpoint of `step` in; what runs that died left behind is removed.

    Raises:
        SquareQError: a whole checkpoint of this step or a later one is there.
    """
    directory.mkdir(parents=True, exist_ok=True)
    for leftover in directory.glob(".checkpoint-*"):
        shutil.rmtree(leftover)
    for number, path in _checkpoints(directory):
        if number >= step and _is_whole(path):
            raise SquareQError(f"{path} is not older than step {step}: resume from it, remove it, or use another directory")
        if number >= step:
            _remove(path)
    partial = directory / f".checkpoint-{step}.partial"
    partial.mkdir()
    return partial


def install(partial: Path, step: int) -> Path:
    """Give the directory its name, when all that is in it has reached the disk."""
    target = partial.with_name(f"checkpoint-{step}")
    sync(partial)
    os.rename(partial, target)
    sync(target.parent)
    return target


def remove_older(directory: Path, keep: int) -> None:
    """Remove all but the newest `keep` whole checkpoints."""
    paths = [path for _, path in _checkpoints(directory)]
    kept = [path for path in paths if _is_whole(path)][:keep]
    for path in paths:
        if path not in kept:
            _remove(path)


def write(path: Path, content: bytes) -> None:
    """A new file, on the disk when this returns."""
    with open(path, "xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def fingerprint(content: bytes) -> dict[str, Any]:
    """Size and checksum of a file."""
    return {"nbytes": len(content), "xxh3_128": xxhash.xxh3_128_hexdigest(content)}


def _checkpoints(directory: Path) -> list[tuple[int, Path]]:
    """Step and path, newest first, whole or not."""
    if not directory.is_dir():
        return []
    named = [(_NAME.fullmatch(path.name), path) for path in directory.iterdir() if path.is_dir()]
    return sorted(((int(match[1]), path) for match, path in named if match), reverse=True)


def _is_whole(path: Path) -> bool:
    """All files are there, at full length; their checksums are compared when they are read."""
    try:
        files = json.loads((path / STATE).read_bytes())["files"]
        return all((path / name).stat().st_size == files[name]["nbytes"] for name in (ADAPTERS, TENSORS))
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _remove(path: Path) -> None:
    """First out of sight: half a checkpoint never has a checkpoint's name."""
    hidden = path.with_name(f".{path.name}.removed")
    os.rename(path, hidden)
    shutil.rmtree(hidden)
