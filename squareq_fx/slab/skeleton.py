"""From what a user calls a source to a module whose parameters are on `meta`, and the tensors that belong to
it.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from squareq_fx.errors import SlabError
from squareq_fx.slab.checkpoint_files import find_checkpoint, read_json
from squareq_fx.slab.sources import Checkpoint, MemoryTensors, Overlay, TensorSource

__all__ = ["ModelClass", "Source", "ignored_when_loading", "named_tensors", "open_source"]

ModelClass = type[nn.Module] | Callable[[], nn.Module]
# init_empty_weights replaces a method of nn.Module for the whole process: two at a time would leave it replaced.
_EMPTY_WEIGHTS = threading.Lock()
_BAD_CONFIG = (TypeError, ValueError, LookupError, AttributeError, ImportError, OSError, RuntimeError)


@dataclass(frozen=True)
class Source:
    """An opened source.

    Attributes:
        model: the user's module, or a skeleton with parameters on `meta` and real non-persistent buffers.
        tensors: everything that is stored.
        stored: the names a checkpoint holds; None if the source is a module.
        what: how messages name it.
        files: the checkpoint's, empty if the source is a module.
    """

    model: nn.Module
    tensors: TensorSource
    stored: frozenset[str] | None
    what: str
    files: tuple[Path, ...] = ()


def open_source(source: nn.Module | str | os.PathLike[str], model_class: ModelClass | None) -> Source:
    """Open a module, a `save_pretrained` directory or one .safetensors file.

    Raises:
        SlabError: the source or the model's class cannot be found, or a file is broken.
    """
    if isinstance(source, nn.Module):
        if model_class is not None:
            raise SlabError("model_class goes with a file or directory; the source is a module already")
        return Source(source, MemoryTensors(named_tensors(source)), None, type(source).__name__)
    path = Path(source)
    if path.is_dir():
        files = find_checkpoint(path)
        model = _skeleton(path, model_class)
    elif path.is_file():
        if model_class is None:
            raise SlabError(f"{path} is one file: pass model_class, the model's class or a function that makes it")
        files = [path]
        model = _skeleton(path.parent, model_class)
    else:
        raise SlabError(f"source {path} does not exist")
    front = Checkpoint(files)
    stored = frozenset(front.specs)
    back = {n: t for n, t in named_tensors(model).items() if n not in stored and t.device.type != "meta"}
    return Source(model, Overlay(front, MemoryTensors(back)), stored, str(path), tuple(files))


def named_tensors(model: nn.Module) -> dict[str, Any]:
    """Every parameter and buffer under every name it has, in registration order."""
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }


def ignored_when_loading(model: nn.Module, name: str, kind: str) -> bool:
    """Whether the model's class says that a tensor may be "missing" or "unexpected" in a checkpoint."""
    patterns = getattr(model, f"_keys_to_ignore_on_load_{kind}", None) or ()
    return any(re.search(pattern, name) for pattern in patterns)


def _skeleton(directory: Path, model_class: ModelClass | None) -> nn.Module:
    from accelerate import init_empty_weights

    if model_class is None:
        make = _maker_from_config(directory)
    elif hasattr(model_class, "from_config"):
        config = read_json(directory / "config.json")
        cls: Any = model_class
        make = lambda: cls.from_config(config)  # noqa: E731
    else:
        make = model_class
    try:
        with _EMPTY_WEIGHTS, init_empty_weights(include_buffers=False):
            model = make()
    except _BAD_CONFIG as error:
        raise SlabError(f"the model of {directory} cannot be made: {type(error).__name__}: {error}") from error
    if not isinstance(model, nn.Module):
        raise SlabError(f"model_class must make an nn.Module, it made {type(model).__name__}")
    tie = getattr(model, "tie_weights", None)
    if callable(tie):
        tie()
    return model.eval()


def _maker_from_config(directory: Path) -> Callable[[], nn.Module]:
    if not (directory / "config.json").is_file():
        raise SlabError(f"{directory} has no config.json, so the model's class is unknown: pass model_class")
    config = read_json(directory / "config.json")
    name = config.get("_class_name")
    if isinstance(name, str):
        import diffusers

        cls = getattr(diffusers, name, None)
        if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
            raise SlabError(f"diffusers {diffusers.__version__} has no model {name!r}: update it or pass model_class")
        return lambda: cls.from_config(config)  # type: ignore[attr-defined]
    architectures = config.get("architectures")
    if isinstance(architectures, list) and architectures and isinstance(architectures[0], str):
        return _transformers_maker(directory, architectures[0])
    raise SlabError(f"{directory / 'config.json'} names neither _class_name nor architectures: pass model_class")


def _transformers_maker(directory: Path, name: str) -> Callable[[], nn.Module]:
    try:
        import transformers
    except ImportError as error:
        raise SlabError(f"{directory} holds a transformers model ({name}): pip install transformers") from error
    cls = getattr(transformers, name, None)
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise SlabError(f"transformers {transformers.__version__} has no model {name!r}: update it or pass model_class")
    return lambda: cls(transformers.AutoConfig.from_pretrained(directory, local_files_only=True))
