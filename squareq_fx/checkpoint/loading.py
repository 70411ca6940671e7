"""Read a checkpoint, compare all of it with what it is loaded into, and only then change anything."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import nn

from squareq_fx.checkpoint import trees
from squareq_fx.checkpoint.directory import ADAPTERS, STATE, TENSORS, VERSION, fingerprint, latest_checkpoint
from squareq_fx.checkpoint.states import Stateful, class_names, group_names, set_random_states, states, trainable
from squareq_fx.errors import SquareQError

__all__ = ["load_checkpoint"]


def load_checkpoint(
    directory: str | os.PathLike[str],
    *,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: Stateful | None = None,
    ema: Stateful | None = None,
    extra: Mapping[str, Stateful] | None = None,
) -> int:
    """Go on from a checkpoint: everything given is set in place to what it was, and so are the random states.

    All is compared first. Then come the extras, which can refuse a state that is not theirs, then everything else.

    Args:
        directory: a checkpoint, or the directory of a run, whose newest whole checkpoint it is then.
        module, optimizer, scheduler, ema, extra: made as they were when it was saved.

    Returns:
        The step.

    Raises:
        SquareQError: no checkpoint is there, it is damaged, or it is not of what is to be loaded: other parameters, shapes,
            dtypes, parameter groups or classes. Every mismatch is listed, and nothing is changed.
    """
    path = Path(directory) if (Path(directory) / STATE).is_file() else latest_checkpoint(directory)
    if path is None:
        raise SquareQError(f"{directory} holds no whole checkpoint; begin the run anew, or give another directory")
    record, adapters, tensors = _read(path)
    parameters = trainable(module)
    here = states(parameters, optimizer, scheduler, ema, extra)
    try:
        saved = trees.join(record["state"], tensors)
        problems = [
            *_compare_tensors("parameter", adapters, parameters),
            *_compare_groups(record["groups"], group_names(optimizer, parameters)),
            *_compare_classes(record["classes"], class_names(optimizer, scheduler, ema, extra)),
            *(_compare_tensors("ema", trees.tensors(saved["ema"]), trees.tensors(here["ema"])) if saved["ema"] and ema else ()),
            *_compare_devices(saved["random"]["cuda"], here["random"]["cuda"]),
        ]
    except (KeyError, TypeError, AttributeError) as error:
        raise SquareQError(f"{path / STATE} is not what this package wrote: {error!r}; resume from an older one") from error
    if problems:
        headline = f"{path} is not a checkpoint of this run; resume with the run's own options:"
        raise SquareQError("\n  - ".join([headline, *problems]))

    saved = trees.placed_as(saved, here)
    for name, value in (extra or {}).items():
        value.load_state_dict(saved["extra"][name])
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(adapters[name])
    optimizer.load_state_dict(saved["optimizer"])
    if scheduler is not None:
        scheduler.load_state_dict(saved["scheduler"])
    if ema is not None:
        ema.load_state_dict(saved["ema"])
    set_random_states(saved["random"], parameters)
    return int(record["step"])


def _read(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    try:
        record = json.loads((path / STATE).read_bytes())
        if record["version"] != VERSION:
            raise SquareQError(f"{path} is of version {record['version']}; this package reads version {VERSION}")
        contents = {name: (path / name).read_bytes() for name in (ADAPTERS, TENSORS)}
        damaged = [name for name, content in contents.items() if fingerprint(content) != record["files"][name]]
        if damaged:
            raise SquareQError(f"{path}: {', '.join(damaged)} is damaged, by its checksum; resume from an older checkpoint")
        return record, safetensors.torch.load(contents[ADAPTERS]), safetensors.torch.load(contents[TENSORS])
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise SquareQError(f"cannot read checkpoint {path}: {error!r}; resume from an older one") from error


def _compare_tensors(what: str, saved: Mapping[str, torch.Tensor], here: Mapping[str, torch.Tensor]) -> Iterator[str]:
    for name in dict.fromkeys([*saved, *here]):
        if name not in here:
            yield f"{what} {name} is in the checkpoint only"
        elif name not in saved:
            yield f"{what} {name} is not in the checkpoint"
        elif (theirs := _type(saved[name])) != (ours := _type(here[name])):
            yield f"{what} {name} is {theirs} in the checkpoint and {ours} here"


def _type(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"


def _compare_groups(saved: list[list[str]], here: list[list[str]]) -> Iterator[str]:
    if len(saved) != len(here):
        yield f"the optimizer has {len(saved)} parameter groups in the checkpoint and {len(here)} here"
        return
    for i, (theirs, ours) in enumerate(zip(saved, here)):
        if theirs != ours:
            differing = set(theirs) ^ set(ours)
            reason = f"{len(differing)} are in one of the two only" if differing else "their order differs"
            yield f"parameter group {i}: {len(theirs)} parameters in the checkpoint, {len(ours)} here; {reason}"


def _compare_classes(saved: Mapping[str, str | None], here: Mapping[str, str | None]) -> Iterator[str]:
    for name in dict.fromkeys([*saved, *here]):
        if saved.get(name) != here.get(name):
            yield f"{name} is {saved.get(name) or 'absent'} in the checkpoint and {here.get(name) or 'absent'} here"


def _compare_devices(saved: list[torch.Tensor], here: list[torch.Tensor]) -> Iterator[str]:
    if len(saved) != len(here):
        yield f"the parameters were on {len(saved)} CUDA devices, each with its random state, and are on {len(here)} here"
