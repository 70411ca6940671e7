"""Write a checkpoint, whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
import torch
from torch import nn

from squareq_fx.checkpoint import trees
from squareq_fx.checkpoint.directory import (
    ADAPTERS,
    STATE,
    TENSORS,
    VERSION,
    fingerprint,
    install,
    make_room,
    remove_older,
    write,
)
from squareq_fx.checkpoint.states import Stateful, class_names, group_names, states, trainable
from squareq_fx.errors import SquareQError

__all__ = ["save_checkpoint"]


def save_checkpoint(
    directory: str | os.PathLike[str],
    *,
    step: int,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: Stateful | None = None,
    ema: Stateful | None = None,
    extra: Mapping[str, Stateful] | None = None,
    keep: int = 3,
) -> Path:
    """Write `directory/checkpoint-<step>`, then remove all but the newest `keep`.

    Saved besides what is given: the random states of torch (of the CPU and of the parameters' devices), numpy and Python.

    Args:
        directory: of the run; made if it is missing. One run at a time writes there.
        step: optimizer steps done.
        module: its parameters that require grad are saved, by name.
        optimizer: of parameters of `module`. scheduler: of its learning rate.
        ema: moving average of the parameters: diffusers' `EMAModel`, torch's `AveragedModel`.
        extra: anything else with a state, the position in the data above all.
        keep: how many checkpoints stay; at least one.

    Returns:
        The checkpoint's directory.

    Raises:
        SquareQError: a state holds something that is neither tensor, number, string nor a container of those; the optimizer has
            a parameter that is not the module's; the directory has a checkpoint of this or a later step; it cannot be written.
    """
    if step < 0 or keep < 1:
        raise SquareQError(f"a checkpoint is of a step >= 0 and at least one is kept, not step={step}, keep={keep}")
    directory = Path(directory)
    parameters = trainable(module)
    state, tensors = trees.split(states(parameters, optimizer, scheduler, ema, extra))
    adapters = {name: trees.copy(parameter) for name, parameter in parameters.items()}
    record = {
        "version": VERSION,
        "step": step,
        "groups": group_names(optimizer, parameters),
        "classes": class_names(optimizer, scheduler, ema, extra),
        "state": state,
    }
    try:
        partial = make_room(directory, step)
        files = {name: safetensors.torch.save(content) for name, content in ((ADAPTERS, adapters), (TENSORS, tensors))}
        for name, content in files.items():
            write(partial / name, content)
        record["files"] = {name: fingerprint(content) for name, content in files.items()}
        write(partial / STATE, json.dumps(record, indent=1).encode())
        target = install(partial, step)
        remove_older(directory, keep)
    except OSError as error:
        raise SquareQError(f"cannot write the checkpoint of step {step} into {directory}: {error}") from error
    return target
