"""What a training run consists of besides its data, and the random states of the process."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from squareq_fx.errors import SquareQError

__all__ = ["Stateful", "class_names", "group_names", "set_random_states", "states", "trainable"]


class Stateful(Protocol):
    """Something that can hand out its state and take it back: a sampler, a scheduler, an average.

    The state is made of tensors, numbers, strings, None, lists, tuples and dicts.
    """

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` needs to go on from here."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> Any:
        """Go on from there; or raise and change nothing."""


def trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that require grad, by name."""
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


def states(
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    scheduler: Stateful | None,
    ema: Stateful | None,
    extra: Mapping[str, Stateful] | None,
) -> dict[str, Any]:
    """Everything but the parameters themselves, as one nested state."""
    return {
        "optimizer": optimizer.state_dict(),
        "scheduler": None if scheduler is None else scheduler.state_dict(),
        "ema": None if ema is None else ema.state_dict(),
        "extra": {name: value.state_dict() for name, value in (extra or {}).items()},
        "random": _random_states(parameters),
    }


def group_names(optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]) -> list[list[str]]:
    """The names behind an optimizer's parameters, which it knows by number only.

    Raises:
        SquareQError: one of them is not in `parameters`.
    """
    names = {id(parameter): name for name, parameter in parameters.items()}
    groups = [[names.get(id(parameter), "") for parameter in group["params"]] for group in optimizer.param_groups]
    strangers = [f"number {j} of group {i}" for i, group in enumerate(groups) for j, name in enumerate(group) if not name]
    if strangers:
        raise SquareQError(
            f"the optimizer has parameters that are not trainable ones of the module, and would be lost: {', '.join(strangers)}"
        )
    return groups


def class_names(
    optimizer: torch.optim.Optimizer,
    scheduler: Stateful | None,
    ema: Stateful | None,
    extra: Mapping[str, Stateful] | None,
) -> dict[str, str | None]:
    """The class of each; None is one that is not there."""
    things = {"optimizer": optimizer, "scheduler": scheduler, "ema": ema}
    things |= {f"extra {name!r}": value for name, value in (extra or {}).items()}
    return {name: None if thing is None else type(thing).__name__ for name, thing in things.items()}


def set_random_states(state: dict[str, Any], parameters: Mapping[str, nn.Parameter]) -> None:
    """Set the random states of torch, numpy and Python to what `states` returned."""
    torch.set_rng_state(state["torch"])
    for device, value in zip(_cuda_devices(parameters), state["cuda"]):
        torch.cuda.set_rng_state(value, device)
    np.random.set_state(state["numpy"])
    random.setstate(state["python"])


def _random_states(parameters: Mapping[str, nn.Parameter]) -> dict[str, Any]:
    name, keys, *rest = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "cuda": [torch.cuda.get_rng_state(device) for device in _cuda_devices(parameters)],
        "numpy": (str(name), torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest),
        "python": random.getstate(),
    }


def _cuda_devices(parameters: Mapping[str, nn.Parameter]) -> list[torch.device]:
    """In the order of their parameters, so that a run may be resumed on another card."""
    return list(dict.fromkeys(parameter.device for parameter in parameters.values() if parameter.device.type == "cuda"))
