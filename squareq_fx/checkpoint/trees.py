"""Nested states as JSON and tensors, and back.

    {"step": tensor, "betas": (0.9, 0.99), 0: "a"}
    {"$items": [["step", {"$tensor": "/step"}], ["betas", {"$tuple": [0.9, 0.99]}], [0, "a"]]}

A dict whose keys are strings that do not begin with `$` is a JSON object. Floats keep every bit, NaN and infinities too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch

from squareq_fx.errors import SquareQError

__all__ = ["copy", "join", "placed_as", "split", "tensors"]


def split(tree: Any) -> tuple[Any, dict[str, torch.Tensor]]:
    """The tree as JSON, and copies of its tensors on the CPU by the names that stand for them.

    Raises:
        SquareQError: it holds something else, with the path to it.
    """
    found: dict[str, torch.Tensor] = {}
    return _split(tree, "", found), found


def join(json: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    """The tree that was split.

    Raises:
        KeyError: a tensor is missing.
    """
    if isinstance(json, list):
        return [join(item, tensors) for item in json]
    if not isinstance(json, dict):
        return json
    match list(json.items()):
        case [("$tensor", name)]:
            return tensors[name]
        case [("$tuple", items)]:
            return tuple(join(item, tensors) for item in items)
        case [("$items", pairs)]:
            return {join(key, tensors): join(value, tensors) for key, value in pairs}
    return {key: join(value, tensors) for key, value in json.items()}


def tensors(tree: Any, path: str = "") -> dict[str, torch.Tensor]:
    """The tensors of a tree by their paths."""
    if isinstance(tree, torch.Tensor):
        return {path: tree}
    found: dict[str, torch.Tensor] = {}
    for key, child in _children(tree):
        found |= tensors(child, f"{path}.{key}" if path else str(key))
    return found


def placed_as(tree: Any, like: Any) -> Any:
    """`tree` with each tensor on the device of the one in its place: diffusers' `EMAModel` keeps what it is given."""
    if isinstance(tree, torch.Tensor):
        return tree.to(like.device) if isinstance(like, torch.Tensor) else tree
    beside = dict(_children(like))
    placed = {key: placed_as(child, beside.get(key)) for key, child in _children(tree)}
    if isinstance(tree, list | tuple):
        return type(tree)(placed.values())
    return placed if isinstance(tree, dict) else tree


def copy(tensor: torch.Tensor) -> torch.Tensor:
    """On the CPU, contiguous, and sharing memory with nothing, as safetensors wants it."""
    return tensor.detach().to("cpu", copy=True).contiguous()


def _split(tree: Any, path: str, found: dict[str, torch.Tensor]) -> Any:
    if tree is None or type(tree) in (bool, int, float, str):
        return tree
    if isinstance(tree, np.generic):
        return tree.item()
    if isinstance(tree, torch.Tensor):
        name = path
        while name in found:  # keys 0 and "0" of one dict
            name += "'"
        found[name] = copy(tree)
        return {"$tensor": name}
    if isinstance(tree, list | tuple):
        items = [_split(item, f"{path}/{i}", found) for i, item in enumerate(tree)]
        return items if isinstance(tree, list) else {"$tuple": items}
    if isinstance(tree, dict):
        pairs = [[_split(key, f"{path}/keys", found), _split(value, f"{path}/{key}", found)] for key, value in tree.items()]
        plain = all(type(key) is str and not key.startswith("$") for key in tree)
        return dict(pairs) if plain else {"$items": pairs}
    raise SquareQError(
        f"{path} is a {type(tree).__name__}; a checkpoint holds tensors, numbers, strings, None, lists, tuples and dicts"
    )


def _children(tree: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(tree, dict):
        yield from tree.items()
    elif isinstance(tree, list | tuple):
        yield from enumerate(tree)
