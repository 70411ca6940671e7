"""What a compilation depends on, as one hash: the model's modules and their source, its configuration, options, versions.

Two values have one identity only if tracing cannot tell them apart. What cannot be looked into has none, and then nothing is
kept. Values of weights do not matter, their names, sizes and types do.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import hashlib
import logging
import re
import sys
import types
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from squareq_fx.stored.source_files import UnreadableError, sources

__all__ = ["NoIdentityError", "identity"]

_OF_TORCH = (torch.dtype, torch.device, torch.layout, torch.memory_format)
_SIMPLE = frozenset({bool, int, float, complex, str, bytes, type(None), range, *_OF_TORCH})
_PLAIN = (str, bytes, int, float)
_METHODS = (types.BuiltinFunctionType, types.MethodType)
_OPERATIONS = (torch._ops.OpOverload, torch._ops.OpOverloadPacket)
_SHARED = (torch.Tensor, torch.nn.Module, type)
_CONTAINERS = frozenset({dict, OrderedDict, list, tuple})
"""Nine of ten values of a model are such, most of them empty."""
_SKIPPED = {"training", "_use_default_values"}
"""Capture is in eval mode whatever a module says; diffusers lists, in random order, which options keep their default."""


class NoIdentityError(Exception):
    """A value that cannot be told apart from others by looking into it."""


def identity(values: Iterable[Any], known: Callable[[Any], Any] = lambda value: None) -> str:
    """32 hex digits of what `values` are.

    Args:
        known: gives something simple that stands for a value, or None.

    Raises:
        NoIdentityError: naming the type that cannot be looked into.
    """
    walk = _Walk(known)
    try:
        for value in values:
            walk.add(value)
    except RecursionError as error:
        raise NoIdentityError("a value that holds itself") from error
    except UnreadableError as error:
        raise NoIdentityError(str(error)) from error
    return walk.digest()


class _Walk:
    def __init__(self, known: Callable[[Any], Any]) -> None:
        self._known = known
        self._said: list[str] = []
        self._classes: dict[type, int] = {}
        self._numbers: dict[int, int] = {}
        self._alive: list[Any] = []
        self._modules: dict[str, str] = {}

    def digest(self) -> str:
        for name in sorted(self._modules):
            self._say("source", name, self._modules[name])
        return hashlib.sha256("\n".join(self._said).encode()).hexdigest()[:32]

    def add(self, value: Any) -> None:
        stands = self._known(value)
        if stands is not None:
            self._say("known", type(value).__qualname__)
            value = stands
        if type(value) in _SIMPLE:
            self._say(type(value).__name__, repr(value))
        elif type(value) in _CONTAINERS:
            if not self._seen(value):
                self._container(value)
        elif isinstance(value, types.ModuleType):
            self._say("module", value.__name__)
        elif isinstance(value, logging.Logger):
            self._say("logger", value.name)
        elif isinstance(value, re.Pattern):
            self._say("pattern", value.pattern, value.flags)
        elif type(value).__module__ == "numpy" and hasattr(value, "tobytes"):
            self._say("numpy", value.dtype.str, value.shape, hashlib.sha256(value.tobytes()).hexdigest())
        elif isinstance(value, type):
            self._class(value)
        elif isinstance(value, enum.Enum):
            self._class(type(value))
            self._say("enum", value.name)
        elif not self._seen(value):
            self._inside(value)

    def _inside(self, value: Any) -> None:
        if isinstance(value, torch.Tensor):
            self._say("tensor", type(value).__name__, value.dtype, tuple(value.shape), tuple(value.stride()))
        elif isinstance(value, _PLAIN):
            plain: Any = next(kind for kind in _PLAIN if isinstance(value, kind))
            self._class(type(value))
            self._say("plain", repr(plain(value)))
        elif isinstance(value, types.FunctionType):
            self._function(value)
        elif isinstance(value, _METHODS):
            self._say("method", getattr(value, "__module__", ""), value.__qualname__)
            self.add(value.__self__ if not isinstance(value.__self__, types.ModuleType) else None)
            if isinstance(value, types.MethodType):
                self.add(value.__func__)
        elif isinstance(value, functools.partial):
            self._all("partial", (value.func, value.args, value.keywords))
        elif isinstance(value, _OPERATIONS):
            self._say("operation", str(value))
        elif isinstance(value, set | frozenset):
            if not all(type(v) in _SIMPLE for v in value):
                raise NoIdentityError(f"a set of other than plain values: {type(value).__qualname__}")
            self._say("set", sorted(map(repr, value)))
        elif isinstance(value, list | tuple | Mapping):
            self._container(value)
        else:
            self._object(value)

    def _container(self, value: Any) -> None:
        self._class(type(value))
        if not isinstance(value, Mapping):
            self._all("items", value)
        elif value:
            kept = {k: v for k, v in value.items() if not (isinstance(k, str) and k in _SKIPPED)}
            self._all("keys", kept.keys())
            self._all("values", kept.values())
        else:
            self._say("nothing")

    def _object(self, value: Any) -> None:
        """An instance of a Python class is its class and its attributes."""
        if type(value).__flags__ & (1 << 9) == 0 or (not hasattr(value, "__dict__") and not _slots(value)):
            raise NoIdentityError(f"a {type(value).__module__}.{type(value).__qualname__}")
        self._class(type(value))
        attributes = {name: getattr(value, name) for name in _slots(value) if hasattr(value, name)}
        attributes |= {k: v for k, v in getattr(value, "__dict__", {}).items() if k not in _SKIPPED}
        if dataclasses.is_dataclass(value):
            attributes |= {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        for name, attribute in attributes.items():
            self._say("attribute", name)
            self.add(attribute)
        self._say("end")

    def _function(self, value: types.FunctionType) -> None:
        self._say("function", value.__module__, value.__qualname__)
        if _of_torch(value.__module__):
            return
        self._code(value.__code__)
        self._all("defaults", value.__defaults__ or ())
        self._all("keyword defaults", tuple((value.__kwdefaults__ or {}).items()))
        for cell in value.__closure__ or ():
            try:
                self.add(cell.cell_contents)
            except ValueError:
                self._say("empty cell")
        if value.__module__:
            self._source(value.__module__)

    def _code(self, code: types.CodeType) -> None:
        self._say("code", code.co_code.hex(), code.co_names, code.co_varnames, code.co_freevars)
        for constant in code.co_consts:
            if isinstance(constant, types.CodeType):
                self._code(constant)
            else:
                self._say("constant", sorted(map(repr, constant)) if isinstance(constant, frozenset) else repr(constant))

    def _class(self, cls: type) -> None:
        known = self._classes.get(cls)
        if known is not None:
            self._say("class again", known)
            return
        self._classes[cls] = len(self._classes)
        for base in cls.__mro__:
            self._say("class", base.__module__, base.__qualname__)
            if self._seen(base) or _of_torch(base.__module__) or base.__module__.partition(".")[0] in sys.stdlib_module_names:
                continue
            self._source(base.__module__)
            if not self._modules[base.__module__]:  # of a notebook, or made while running
                for name, member in vars(base).items():
                    if isinstance(member, types.FunctionType):
                        self._say("member", name)
                        self._code(member.__code__)

    def _source(self, module: str) -> None:
        if module not in self._modules:
            self._modules |= {module: "", **sources(module, self._modules)}

    def _seen(self, value: Any) -> bool:
        """Whether it came before; then its number is said, so that what is shared is told from what is equal."""
        shared = isinstance(value, _SHARED) or hasattr(value, "__dict__")
        number = self._numbers.get(id(value))
        if number is not None:
            self._say("again", number)
            return True
        if shared:
            self._numbers[id(value)] = len(self._numbers)
            self._alive.append(value)  # an id may be given again once its owner is gone
        return False

    def _all(self, what: str, values: Iterable[Any]) -> None:
        values = list(values)
        self._say(what, len(values))
        for value in values:
            self.add(value)

    def _say(self, *words: Any) -> None:
        self._said.append(repr(words))


def _of_torch(module: str | None) -> bool:
    """The version of torch counts, not its files."""
    return (module or "").partition(".")[0] == "torch"


def _slots(value: Any) -> list[str]:
    found = [getattr(cls, "__slots__", ()) for cls in type(value).__mro__]
    return [name for names in found for name in ([names] if isinstance(names, str) else names) if name != "__weakref__"]
