"""Example inputs as JSON and back: shapes, dtypes and literals, never values of tensors."""

from __future__ import annotations

import math
from typing import Any

import torch

from squareq_fx.errors import SlabError
from squareq_fx.slab.safetensors_header import DTYPE_NAMES
from squareq_fx.slab.strict_json import plain_int

__all__ = ["describe_inputs", "restore_inputs", "split_inputs"]

_LARGEST = 2**62
_DEEPEST = 32
_MOST_DIMS = 64


def split_inputs(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """(args, kwargs) from what a user gives: a dict of keywords, a tuple or list of positionals, or a pair of
    both.

    Raises:
        SlabError: it is none of these.
    """
    if isinstance(example_inputs, dict):
        return (), dict(example_inputs)
    if isinstance(example_inputs, tuple | list):
        if len(example_inputs) == 2 and isinstance(example_inputs[0], tuple | list) and isinstance(example_inputs[1], dict):
            return tuple(example_inputs[0]), dict(example_inputs[1])
        return tuple(example_inputs), {}
    raise SlabError(
        f"example_inputs must be a dict of keyword arguments, a tuple of positional ones, or a pair of both; "
        f"got {type(example_inputs).__name__}"
    )


def describe_inputs(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The input signature of a call as plain JSON.

    A tensor becomes `{"tensor": {"shape": [...], "dtype": "bfloat16"}}`, a dict `{"dict": {...}}`, a tuple
    `{"tuple": [...]}`, a list a list; None, bool, int, float and str stay.

    Raises:
        SlabError: anything else, a dict whose keys are not strings, or a float that is not finite; says
            where.
    """
    return {
        "args": [_describe(value, f"args[{i}]", 0) for i, value in enumerate(args)],
        "kwargs": {name: _describe(value, name, 0) for name, value in kwargs.items()},
    }


def restore_inputs(obj: Any, device: str | torch.device = "meta") -> tuple[tuple[Any, ...], dict[str, Any]]:
    """(args, kwargs) from `describe_inputs`'s result; the tensors are zeros on `device`.

    Raises:
        SlabError: not such a description.
    """
    if (
        not isinstance(obj, dict)
        or set(obj) != {"args", "kwargs"}
        or not isinstance(obj["args"], list)
        or not isinstance(obj["kwargs"], dict)
    ):
        raise SlabError("an input signature must be an object with a list args and an object kwargs")
    args = tuple(_restore(value, f"args[{i}]", device, 0) for i, value in enumerate(obj["args"]))
    return args, {name: _restore(value, name, device, 0) for name, value in obj["kwargs"].items()}


def _describe(value: Any, where: str, depth: int) -> Any:
    if depth > _DEEPEST:
        raise SlabError(f"example input {where} is nested more than {_DEEPEST} deep")
    if isinstance(value, torch.Tensor) and value.dtype in DTYPE_NAMES:
        return {"tensor": {"shape": list(value.shape), "dtype": str(value.dtype).removeprefix("torch.")}}
    if isinstance(value, dict):
        if not all(isinstance(key, str) for key in value):
            raise SlabError(f"example input {where} is a dict whose keys are not all strings")
        return {"dict": {k: _describe(v, f"{where}.{k}", depth + 1) for k, v in value.items()}}
    if isinstance(value, tuple | list):
        inner = [_describe(v, f"{where}[{i}]", depth + 1) for i, v in enumerate(value)]
        return {"tuple": inner} if isinstance(value, tuple) else inner
    if value is None or isinstance(value, bool | int | str) or (isinstance(value, float) and math.isfinite(value)):
        return value
    raise SlabError(
        f"example input {where} of type {type(value).__name__} cannot be recorded; use tensors, "
        f"finite numbers, strings, None, lists, tuples and dicts"
    )


def _restore(value: Any, where: str, device: str | torch.device, depth: int) -> Any:
    if depth > _DEEPEST:
        raise SlabError(f"the input signature nests more than {_DEEPEST} deep at {where}")
    if isinstance(value, list):
        return [_restore(v, f"{where}[{i}]", device, depth + 1) for i, v in enumerate(value)]
    if not isinstance(value, dict):
        return value
    if len(value) == 1:
        ((tag, inner),) = value.items()
        if tag == "tensor":
            return _restore_tensor(inner, where, device)
        if tag == "tuple" and isinstance(inner, list):
            return tuple(_restore(v, f"{where}[{i}]", device, depth + 1) for i, v in enumerate(inner))
        if tag == "dict" and isinstance(inner, dict):
            return {k: _restore(v, f"{where}.{k}", device, depth + 1) for k, v in inner.items()}
    raise SlabError(f"the input signature is wrong at {where}: expected tensor, tuple or dict, got {ascii(value)[:80]}")


def _restore_tensor(spec: Any, where: str, device: str | torch.device) -> torch.Tensor:
    if isinstance(spec, dict) and set(spec) == {"shape", "dtype"}:
        shape, dtype = spec["shape"], getattr(torch, str(spec["dtype"]), None)
        if (
            isinstance(dtype, torch.dtype)
            and dtype in DTYPE_NAMES
            and isinstance(shape, list)
            and len(shape) <= _MOST_DIMS
            and all(plain_int(d) and d >= 0 for d in shape)
            and math.prod(d or 1 for d in shape) * dtype.itemsize <= _LARGEST
        ):
            return torch.zeros(shape, dtype=dtype, device=device)
    raise SlabError(f"the input signature is wrong at {where}: not a tensor's shape and dtype: {ascii(spec)[:80]}")
