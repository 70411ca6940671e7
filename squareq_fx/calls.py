"""A call of a model, taken apart into tensors with paths and everything else; and put together again."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree

from squareq_fx.errors import BindingError

__all__ = ["bind", "flatten_call", "normalise_example", "rebuild_call"]


def normalise_example(example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """`example_inputs` as (args, kwargs): a dict is keywords, a tuple positions, a (tuple, dict) pair both.

    Raises:
        BindingError: it is none of these.
    """
    if isinstance(example, Mapping):
        return (), dict(example)
    if isinstance(example, tuple | list):
        if len(example) == 2 and isinstance(example[0], tuple | list) and isinstance(example[1], Mapping):
            return tuple(example[0]), dict(example[1])
        return tuple(example), {}
    raise BindingError(
        f"example_inputs is a {type(example).__name__}; give a dict of keyword arguments, a tuple of positional ones, "
        "or a pair (tuple, dict)"
    )


def bind(signature: inspect.Signature, args: Sequence[Any], kwargs: Mapping[str, Any], what: str) -> inspect.BoundArguments:
    """Bind a call to the model's own signature, defaults not applied.

    Raises:
        BindingError: the call does not fit the signature.
    """
    try:
        return signature.bind(*args, **kwargs)
    except TypeError as error:
        raise BindingError(f"{what}: {error}; the signature is {signature}") from error


def flatten_call(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Bound arguments as path -> leaf, in order: `{"sample": t, "added_cond_kwargs['time_ids']": t}`.

    An empty or absent container has no leaf; None is one.
    """
    leaves: dict[str, Any] = {}
    for name, value in arguments.items():
        for path, leaf in pytree.tree_flatten_with_path(value, is_leaf=lambda v: v is None)[0]:
            leaves[name + pytree.keystr(path)] = leaf
    return leaves


def rebuild_call(
    signature: inspect.Signature, arguments: Mapping[str, Any]
) -> Callable[[Sequence[torch.Tensor]], inspect.BoundArguments]:
    """A function from new tensors, in `flatten_call`'s order, to the same call with those tensors in it."""
    leaves, tree = pytree.tree_flatten(dict(arguments), is_leaf=lambda v: v is None)
    slots = [isinstance(leaf, torch.Tensor) for leaf in leaves]

    def build(tensors: Sequence[torch.Tensor]) -> inspect.BoundArguments:
        new = iter(tensors)
        filled = [next(new) if slot else leaf for slot, leaf in zip(slots, leaves)]
        return inspect.BoundArguments(signature, pytree.tree_unflatten(filled, tree))  # type: ignore[arg-type]

    return build
