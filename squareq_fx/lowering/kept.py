"""Programs on disk beside the graphs, so that a second process neither traces a function for Inductor nor looks for it there.

A program's key is a hash of all that the compiler was given: the function's decomposed operations, the types of its inputs, the
sizes it is tuned for, this package's source, versions, the device, and every setting. What says more of itself than can be
written down (an operation of the user's own) has no key, and is left to Inductor's cache. The folder is trusted as that one is
(`stored.code`): a checksum finds damage, not intent.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import operator
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import fx

from squareq_fx.durable import write_whole
from squareq_fx.lowering.portable import Loaded
from squareq_fx.lowering.symbols import Sizes
from squareq_fx.stored.code import StoredCode, read_code, write_code
from squareq_fx.stored.errors import DamagedError
from squareq_fx.stored.folder import LIMIT_BYTES, folder_of, prune
from squareq_fx.stored.surroundings import compiler_settings, versions

__all__ = ["KeptPrograms", "program_code_key"]

_KNOWN = ("aten", "prims", "squareq")
_HOMES = {"_operator": operator, "math": math, "torch": torch}
_SIMPLE = (bool, int, float, complex, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format)


class KeptPrograms:
    """A folder of programs.

    Args:
        folder: made when the first program is kept.
        limit: most bytes of all entries, graphs too.
    """

    def __init__(self, folder: Path, limit: int = LIMIT_BYTES) -> None:
        self.folder = folder
        self._limit = limit

    @classmethod
    def of(cls, cache: bool | str | os.PathLike[str]) -> KeptPrograms | None:
        """The one of `folder_of(cache)`."""
        folder = folder_of(cache)
        return None if folder is None else cls(folder)

    def get(self, key: str, load: Callable[[StoredCode], Loaded]) -> tuple[StoredCode, Loaded] | None:
        """The program of this key, read and loaded, if both can be done; what is there and cannot be used is told in a warning.

        Args:
            load: `portable.load`.
        """
        path = self._path(key)
        try:
            code = read_code(path.read_bytes(), key)
            loaded = load(code)
            os.utime(path)
        except FileNotFoundError:
            return None
        except (OSError, DamagedError) as error:
            self._warn(f"the program kept in {path} cannot be used and is compiled again: {error}")
            return None
        return code, loaded

    def put(self, key: str, code: StoredCode) -> None:
        """Keep a program; what cannot be written is told in a warning."""
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            write_whole(self._path(key), write_code(code, key))
            prune(self.folder, self._limit, keep=key)
        except OSError as error:
            self._warn(f"a compiled program is not kept: {error}")

    def drop(self, key: str) -> None:
        """Keep a program no longer; nothing if it cannot be removed."""
        with contextlib.suppress(OSError):
            self._path(key).unlink(missing_ok=True)

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.code"

    def _warn(self, text: str) -> None:
        warnings.warn(f"{text}. cache=False compiles without the cache", stacklevel=2)


def program_code_key(
    body: fx.Graph, values: Sequence[Any], sizes: Sizes, tuned: Sequence[int], settings: Any
) -> str | None:
    """The key of what Inductor makes of a function; None if it holds what cannot be written down.

    Args:
        body: the function as Inductor gets it, with an input for each of `values`.
        values: the `val`s of its inputs, whose sizes are written in the names of `sizes`.
        tuned: the sizes that the program is made for.
        settings: the options given to Inductor.
    """
    device = next((v.device for v in values if isinstance(v, torch.Tensor)), torch.device("cpu"))
    numbers = {node: number for number, node in enumerate(body.nodes)}
    try:
        lines = [f"{node.op} {_target(node)} {_written((node.args, node.kwargs), numbers)}" for node in numbers]
    except _UnwrittenError:
        return None
    around = (versions(device), compiler_settings(device), settings, sizes.names, tuple(tuned))
    text = "\n".join([repr(around), *(_type(value, sizes) for value in values), *lines])
    return hashlib.sha256(text.encode()).hexdigest()[:32]


class _UnwrittenError(Exception):
    """A value that says more than can be written down."""


def _type(value: Any, sizes: Sizes) -> str:
    def size(one: Any) -> str:
        return str(sizes.within(one.node.expr)) if isinstance(one, torch.SymInt) else repr(one)

    if not isinstance(value, torch.Tensor):
        return f"{type(value).__name__} {size(value)}"
    return f"{value.dtype} {value.device} {[*map(size, value.shape)]} {[*map(size, value.stride())]}"


def _target(node: fx.Node) -> str:
    """What a node calls, by the name under which this version of torch, or this source, defines it."""
    target = node.target
    if node.op in ("placeholder", "output"):
        return ""
    if isinstance(target, torch._ops.OpOverload) and target.namespace in _KNOWN:
        return str(target)
    module, name = getattr(target, "__module__", None), getattr(target, "__name__", "")
    if module in _HOMES and getattr(_HOMES[module], name, None) is target:
        return f"{module}.{name}"
    raise _UnwrittenError


def _written(value: Any, numbers: Mapping[fx.Node, int]) -> str:
    """`repr`, with a node's number for its name, and told apart by type: 1, 1.0 and True are three."""
    if isinstance(value, fx.Node):
        return f"%{numbers[value]}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(_written(v, numbers) for v in value)}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{k!r}: {_written(v, numbers)}' for k, v in value.items())}}}"
    if isinstance(value, slice):
        return f"slice{_written((value.start, value.stop, value.step), numbers)}"
    if type(value) in _SIMPLE:
        return repr(value)
    raise _UnwrittenError
