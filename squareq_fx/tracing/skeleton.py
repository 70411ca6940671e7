"""A model's modules without its weights."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

__all__ = ["plain_tensors", "skeleton"]

_PLAIN = (bool, int, float, str, type(None))
_CONTAINERS = (dict, list, tuple, set)


def skeleton(model: nn.Module) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """The model's modules in eval mode with every tensor on `meta`, and the tensors that are plain attributes, by path.

    Nothing is read or copied but Python objects.
    """
    memo: dict[int, Any] = {id(t): _meta_twin(t) for t in (*model.parameters(), *model.buffers())}
    constants = {path: value for path, value in plain_tensors(model) if id(value) not in memo}
    memo.update((id(value), _meta_twin(value)) for value in constants.values())
    return copy.deepcopy(model, memo).eval(), constants


def plain_tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors that are attributes, or in a list, tuple or dict that is one, by path; parameters and buffers too."""
    for path, module in model.named_modules():
        for name, attribute in vars(module).items():
            if name == "_modules" or isinstance(attribute, _PLAIN) or (isinstance(attribute, _CONTAINERS) and not attribute):
                continue  # most attributes are such, and pytree takes long to say so
            for inner, value in pytree.tree_flatten_with_path(attribute)[0]:
                if isinstance(value, torch.Tensor):
                    yield (f"{path}.{name}" if path else name) + pytree.keystr(inner), value


def _meta_twin(tensor: torch.Tensor) -> torch.Tensor:
    twin = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
    return nn.Parameter(twin, requires_grad=False) if isinstance(tensor, nn.Parameter) else twin
