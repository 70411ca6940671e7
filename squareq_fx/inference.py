"""What an operation gives for arguments of known types, without computing it."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch.fx.node import map_arg

from squareq_fx import ops
from squareq_fx.errors import PassError
from squareq_fx.specs import spec

__all__ = ["empty", "infer", "mode_of", "new_size"]


_MEMOS: weakref.WeakKeyDictionary[Any, dict[Any, Any]] = weakref.WeakKeyDictionary()


def infer(target: Callable[..., Any], args: Any, kwargs: Any, mode: Any = None) -> Any:
    """The `val` that `target` gives for the `val`s of the nodes in `args` and `kwargs`.

    The answer depends on the types of the arguments alone, so the same operation on the same types is inferred once: a model
    of 57 equal blocks costs one block.

    Args:
        mode: the fake tensor mode for an operation that takes no tensor; otherwise the arguments' own is used.

    Raises:
        PassError: the operation refuses these arguments.
    """
    nodes: list[fx.Node] = []
    map_arg((args, kwargs), nodes.append)
    modes = [found for node in nodes if (found := mode_of(node.meta.get("val"))) is not None]
    modes += [mode] if mode is not None else []
    if not modes:
        return _run(target, args, kwargs, modes)
    memo = _MEMOS.setdefault(modes[0], {})
    key = (target, str(map_arg((args, kwargs), lambda n: _Typed(spec(n.meta.get("val"))))))
    if key not in memo:
        memo[key] = _run(target, args, kwargs, modes)
    return memo[key]


class _Typed(str):
    def __repr__(self) -> str:
        return f"<{self!s}>"


def _unpacked(weights: torch.Tensor, offset: int, size: list[int], dtype: torch.dtype) -> torch.Tensor:
    """The type of `squareq.unpack`, without making its three views: a model has thousands."""
    if offset < 0 or offset + math.prod(size) * dtype.itemsize > weights.shape[0]:
        raise ValueError(f"bytes {offset} and on of {size} {dtype} are not inside a buffer of {weights.shape[0]}")
    return weights.new_empty(size, dtype=dtype)


_RULES: dict[Any, Callable[..., Any]] = {ops.unpack: _unpacked}


def _run(target: Callable[..., Any], args: Any, kwargs: Any, modes: list[Any]) -> Any:
    target = _RULES.get(target, target)
    fake_args, fake_kwargs = map_arg((args, kwargs), lambda n: n.meta["val"])
    try:
        if not modes:
            return target(*fake_args, **fake_kwargs)
        # The Python dispatcher keeps sizes symbolic where C++ composites would turn them into constants, and no inference
        # may narrow what the captured graph is valid for.
        with modes[0], torch.no_grad(), enable_python_dispatcher(), modes[0].shape_env.suppress_guards():
            return target(*fake_args, **fake_kwargs)
    except Exception as error:
        line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise PassError(f"{target} does not take these arguments: {line}") from error


def new_size(mode: Any, name: str) -> torch.SymInt:
    """A size that no input tells: one symbol for each name, which nothing may assume anything of.

    Its hint, the value that tracing goes by where it must take a branch, is a prime no other size is likely to be.
    """
    from torch._dynamo.source import ConstantSource
    from torch.fx.experimental.symbolic_shapes import DimDynamic, StatelessSymbolicContext

    sizes = _SIZES.setdefault(mode, {})
    if name not in sizes:
        context: Any = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC])
        tensor = mode.from_tensor(torch.empty(_HINT), symbolic_context=context, source=ConstantSource(name))
        sizes[name] = tensor.shape[0]
    return sizes[name]


_HINT = 13
_SIZES: weakref.WeakKeyDictionary[Any, dict[str, torch.SymInt]] = weakref.WeakKeyDictionary()


def empty(mode: Any, shape: tuple[Any, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A fake contiguous tensor, the `val` of a new input."""
    with mode:
        return torch.empty(shape, dtype=dtype, device=device)


def mode_of(val: Any) -> Any:
    """The `FakeTensorMode` a `val` lives in; None for a value that is no tensor."""
    for leaf in val if isinstance(val, tuple | list) else (val,):
        if hasattr(leaf, "fake_mode"):
            return leaf.fake_mode
    return None
