"""Arguments, types and records of a graph as JSON: plain values as they are, everything else as [tag, ...]."""

from __future__ import annotations

import dataclasses
import enum
import importlib
import math
from collections.abc import Callable
from types import MappingProxyType
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from squareq_fx.stored.errors import DamagedError, UnstorableError
from squareq_fx.stored.expressions import Symbols, encode_expression, new_mode, symbol_entry

__all__ = ["ValueReader", "ValueWriter", "decode_tree", "encode_tree"]

_PLAIN = (bool, int, str, type(None))
_OF_TORCH = (torch.dtype, torch.layout, torch.memory_format)
_OURS = "squareq_fx."


class ValueWriter:
    """Writes values; collects the sizes and types they mention, each once."""

    def __init__(self, mode: Any) -> None:
        self._mode = mode
        self._env = mode.shape_env
        self._types: dict[str, int] = {}
        self._expressions: dict[Any, Any] = {}
        self._of_val: dict[int, tuple[Any, int]] = {}
        self.types: list[Any] = []
        self.symbols: dict[Any, list[Any]] = {}

    def write(self, value: Any, node: Callable[[fx.Node], int] | None = None) -> Any:
        """The value as JSON.

        Args:
            node: gives a node's number, if the value may hold nodes.

        Raises:
            UnstorableError: it is none of what graphs and records are made of.
        """
        if type(value) in _PLAIN:
            return value
        if isinstance(value, fx.Node) and node is not None:
            return ["node", node(value)]
        if isinstance(value, torch.Tensor):
            return ["type", self._type(value)]
        if isinstance(value, float):
            return value if math.isfinite(value) else ["float", repr(value)]
        if isinstance(value, enum.Enum) and type(value).__module__.startswith(_OURS):
            return ["enum", _name(type(value)), value.value]
        for kinds, tag in ((list, "list"), (tuple, "tuple")):
            if isinstance(value, kinds) and not hasattr(value, "_fields"):
                return [tag, *(self.write(v, node) for v in value)]
        if type(value) in (dict, MappingProxyType) or isinstance(value, fx.immutable_collections.immutable_dict):
            return ["dict", *([self.write(k, node), self.write(v, node)] for k, v in value.items())]
        if isinstance(value, slice):
            return ["slice", *(self.write(v, node) for v in (value.start, value.stop, value.step))]
        for symbolic, tag in ((torch.SymInt, "size"), (torch.SymFloat, "number"), (torch.SymBool, "truth")):
            if isinstance(value, symbolic):
                return [tag, self.expression(value.node.expr)]
        if isinstance(value, _OF_TORCH):
            return ["torch", str(value).removeprefix("torch.")]
        if isinstance(value, torch.device):
            return ["device", str(value)]
        if isinstance(value, complex):
            return ["complex", value.real, value.imag]
        if dataclasses.is_dataclass(value) and type(value).__module__.startswith(_OURS):
            fields = {f.name: self.write(getattr(value, f.name), node) for f in _fields(type(value))}
            return ["record", _name(type(value)), fields]
        raise UnstorableError(f"a {type(value).__module__}.{type(value).__qualname__} is not written")

    def expression(self, expr: Any) -> Any:
        """An expression of sizes as JSON; its symbols are remembered."""
        import sympy

        expr = sympy.sympify(self._env.replace(expr))
        if expr not in self._expressions:
            self._expressions[expr] = encode_expression(expr)
            for symbol in expr.free_symbols:
                self.symbols.setdefault(symbol, symbol_entry(self._env, symbol))
        return self._expressions[expr]

    def conditions(self) -> list[Any]:
        """What is known of the sizes that are written: the guards whose symbols are all among them."""
        expressions = [self._env.replace(guard.expr) for guard in self._env.guards]
        known = [e for e in expressions if e.free_symbols and e.free_symbols <= self.symbols.keys()]
        return [self.expression(e) for e in dict.fromkeys(known)]

    def _type(self, val: torch.Tensor) -> int:
        held = self._of_val.get(id(val))
        if held is not None:
            return held[1]
        if getattr(val, "fake_mode", None) is not self._mode or val.layout != torch.strided:
            raise UnstorableError("a tensor with values, or one that is not strided, is not written")
        sizes = [[self._size(s) for s in part] for part in (val.shape, val.stride())]
        entry = [str(val.dtype).removeprefix("torch."), str(val.device), *sizes]
        key = repr(entry)
        if key not in self._types:
            self._types[key] = len(self.types)
            self.types.append(entry)
        self._of_val[id(val)] = val, self._types[key]
        return self._types[key]

    def _size(self, size: Any) -> Any:
        return self.expression(size.node.expr) if isinstance(size, torch.SymInt) else int(size)


class ValueReader:
    """Reads what a `ValueWriter` wrote; the types live in a mode of their own."""

    def __init__(self, symbols: Symbols) -> None:
        self.symbols = symbols
        self.mode = new_mode(symbols.env)

    def types(self, entries: list[Any]) -> list[torch.Tensor]:
        """Fake tensors of the types a writer collected."""
        with self.mode, torch.no_grad(), self.symbols.env.suppress_guards():
            return [self._tensor(*entry) for entry in entries]

    def read(self, written: Any, types: list[torch.Tensor], nodes: list[fx.Node] | None = None) -> Any:
        """The value.

        Raises:
            DamagedError: nothing writes this.
        """
        if type(written) in _PLAIN or isinstance(written, float):
            return written

        def inner(value: Any) -> Any:
            return self.read(value, types, nodes)

        match written:
            case ["node", int(i)] if nodes is not None and 0 <= i < len(nodes):
                return nodes[i]
            case ["type", int(i)] if 0 <= i < len(types):
                return types[i]
            case ["float", str(text)]:
                return float(text)
            case ["list", *items]:
                return [inner(v) for v in items]
            case ["tuple", *items]:
                return tuple(inner(v) for v in items)
            case ["dict", *pairs]:
                return {inner(k): inner(v) for k, v in pairs}
            case ["slice", start, stop, step]:
                return slice(inner(start), inner(stop), inner(step))
            case ["size", expression]:
                return self.symbols.size(expression)
            case ["number", expression]:
                return self.symbols.number(expression)
            case ["truth", expression]:
                return self.symbols.truth(expression)
            case ["torch", str(name)] if isinstance(getattr(torch, name, None), _OF_TORCH):
                return getattr(torch, name)
            case ["device", str(name)]:
                return torch.device(name)
            case ["complex", float(real), float(imag)]:
                return complex(real, imag)
            case ["enum", str(name), value]:
                return _class(name, enum.EnumMeta)(value)
            case ["record", str(name), dict(fields)]:
                cls: Any = _class(name, type)
                is_record = dataclasses.is_dataclass(cls)
                if is_record and fields.keys() == {f.name for f in _fields(cls)}:
                    return cls(**{k: inner(v) for k, v in fields.items()})
        raise DamagedError(f"{str(written)[:80]} is no value")

    def _tensor(self, dtype: str, device: str, shape: list[Any], strides: list[Any]) -> torch.Tensor:
        sizes = [[self.symbols.size(s) for s in part] for part in (shape, strides)]
        kind = getattr(torch, dtype, None)
        if not isinstance(kind, torch.dtype):
            raise DamagedError(f"there is no type {dtype!r}")
        return torch.empty_strided(*sizes, dtype=kind, device=device)


def _fields(cls: Any) -> list[dataclasses.Field[Any]]:
    return [f for f in dataclasses.fields(cls) if f.init]


def _name(cls: type) -> str:
    return f"{cls.__module__}:{cls.__qualname__}"


def _class(name: str, kind: Any) -> Any:
    """A class of this package, by its name; nothing else is ever looked up."""
    module, _, qualname = name.partition(":")
    if not module.startswith(_OURS) or not qualname.isidentifier():
        raise DamagedError(f"{name!r} is no record of this package")
    try:
        found = getattr(importlib.import_module(module), qualname)
    except (ImportError, AttributeError) as error:
        raise DamagedError(f"there is no record {name!r}") from error
    if not isinstance(found, kind):
        raise DamagedError(f"{name!r} is no record of this package")
    return found


# ------------------------------------------------------------------------------------------------- the structure of outputs


def encode_tree(tree: Any, writer: ValueWriter) -> Any:
    """A pytree's structure as JSON.

    Raises:
        UnstorableError: its context is no plain value.
    """
    if tree.is_leaf():
        return None
    children = tree.children() if hasattr(tree, "children") else tree.children_specs
    return [_name(tree.type), writer.write(tree.context), *(encode_tree(child, writer) for child in children)]


def decode_tree(written: Any, reader: ValueReader) -> Any:
    """The structure again; its classes must be known to torch, as those of a model that is there are.

    Raises:
        DamagedError: a class is not.
    """
    if written is None:
        return pytree.tree_structure(0)
    name, context, *children = written
    cls = next((c for c in pytree.SUPPORTED_NODES if _name(c) == name), None)
    if cls is None:
        raise DamagedError(f"torch.utils._pytree knows no {name}")
    return pytree.TreeSpec(cls, reader.read(context, []), [decode_tree(child, reader) for child in children])
