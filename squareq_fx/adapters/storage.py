"""What lies on disk: tensors, metadata and configuration of an adapter, not yet understood; and writing them atomically."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from squareq_fx.durable import sync
from squareq_fx.errors import AdapterError

__all__ = [
    "DIFFUSERS_METADATA",
    "DIFFUSERS_WEIGHTS",
    "KOHYA_PREFIXES",
    "PEFT_CONFIG",
    "PEFT_PREFIX",
    "PEFT_WEIGHTS",
    "Layout",
    "Stored",
    "open_adapter",
    "packed",
    "staged",
    "write_tensors",
]

Layout = Literal["diffusers", "peft", "kohya"]

DIFFUSERS_WEIGHTS = "pytorch_lora_weights.safetensors"
DIFFUSERS_METADATA = "lora_adapter_metadata"
PEFT_WEIGHTS = "adapter_model.safetensors"
PEFT_CONFIG = "adapter_config.json"
PEFT_PREFIX = "base_model.model."
KOHYA_PREFIXES = ("lora_unet_", "lora_transformer_")


@dataclass(frozen=True)
class Stored:
    """An adapter as it was found.

    Args:
        where: the file, for messages.
        tensors: every tensor by its key, on the CPU, as stored.
        layout: whose keys they are.
        metadata: safetensors' `__metadata__`.
        config: PEFT's `LoraConfig` as a dict, where the format has a file for it or the caller gave one.
    """

    where: str
    tensors: Mapping[str, torch.Tensor]
    layout: Layout
    metadata: Mapping[str, str] = field(default_factory=dict)
    config: Mapping[str, Any] | None = None


def open_adapter(source: str | os.PathLike[str] | Mapping[str, torch.Tensor], config: Mapping[str, Any] | None) -> Stored:
    """Find and load what `source` names.

    Raises:
        AdapterError: nothing is there, it is no safetensors file, or it is not clear which of several is meant.
    """
    if isinstance(source, Mapping):
        return Stored("the state dict", source, _layout_of(source), config=config)
    path = Path(source)
    if config is not None:
        raise AdapterError(f"{path}: a configuration goes with a state dict; a file has its own")
    path = _weights_in(path) if path.is_dir() else path
    if not path.is_file():
        raise AdapterError(f"{path}: no such file; adapters are read from this machine's disk, nothing is downloaded")
    tensors, metadata = _load(path)
    beside = path.with_name(PEFT_CONFIG)
    if path.name == PEFT_WEIGHTS and beside.is_file():
        return Stored(str(path), tensors, "peft", metadata, _read_config(beside))
    return Stored(str(path), tensors, _layout_of(tensors), metadata)


def _weights_in(directory: Path) -> Path:
    """The file of an adapter's directory: by its usual name, or the only one there is."""
    usual = [directory / name for name in (DIFFUSERS_WEIGHTS, PEFT_WEIGHTS) if (directory / name).is_file()]
    found = usual or sorted(directory.glob("*.safetensors"))
    if len(found) == 1:
        return found[0]
    if found:
        names = ", ".join(path.name for path in found)
        raise AdapterError(f"{directory}: holds {names}; name the file that is meant")
    pickles = sorted(path.name for path in directory.iterdir() if path.suffix in (".bin", ".pt", ".ckpt", ".pth"))
    hint = f"; {', '.join(pickles)} would have to be unpickled, convert it to safetensors" if pickles else ""
    raise AdapterError(f"{directory}: has no {DIFFUSERS_WEIGHTS}, no {PEFT_WEIGHTS} and no other safetensors file{hint}")


def _load(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise AdapterError(f"{path}: not a safetensors file that can be read: {error}") from error


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise AdapterError(f"{path}: not JSON that can be read: {error}") from error
    if not isinstance(config, dict):
        raise AdapterError(f"{path}: is a {type(config).__name__}, not the object of a LoraConfig")
    return config


def _layout_of(tensors: Mapping[str, torch.Tensor]) -> Layout:
    if any(key.startswith((*KOHYA_PREFIXES, "lora_te")) for key in tensors):
        return "kohya"
    return "peft" if any(key.startswith(PEFT_PREFIX) for key in tensors) else "diffusers"


def packed(tensors: Mapping[str, torch.Tensor], where: Path, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Copies to write: contiguous, on the CPU, in `dtype`.

    Raises:
        AdapterError: values are not finite there; float16 ends at 65504.
    """
    copies = {key: tensor.detach().to("cpu", dtype, copy=True).contiguous() for key, tensor in tensors.items()}
    bad = [key for key, copy in copies.items() if not torch.isfinite(copy).all()]
    problems = [f"{key} has NaN, infinite or too large values" for key in bad]
    if problems:
        raise AdapterError(f"{where}: the adapter has values that {dtype} cannot hold", problems)
    return copies


def write_tensors(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str]) -> None:
    """A safetensors file with the usual permissions, the same bytes for the same contents.

    The library's own `save_file` makes files that only their owner may read, and orders metadata at random.
    """
    data = memoryview(save(tensors, {"format": "pt", **metadata}))
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(bytes(data[8:end]))
    ordered = {"__metadata__": dict(sorted(header.pop("__metadata__").items())), **header}
    text = json.dumps(ordered, separators=(",", ":"), ensure_ascii=False).encode()
    text = text.ljust(-(-len(text) // 8) * 8)  # tensors begin at a multiple of 8
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        file.write(data[end:])


@contextlib.contextmanager
def staged(*paths: Path) -> Iterator[tuple[Path, ...]]:
    """Temporary names beside `paths` to write to; put in place, in that order, when all are written, and gone on an error."""
    directory = paths[0].parent
    directory.mkdir(parents=True, exist_ok=True)
    temporary = tuple(path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial") for path in paths)
    try:
        yield temporary
        for path in temporary:
            sync(path)
        for partial, path in zip(temporary, paths):
            os.replace(partial, path)
        sync(directory)
    finally:
        for path in temporary:
            path.unlink(missing_ok=True)
