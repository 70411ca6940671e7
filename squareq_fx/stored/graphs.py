"""A GraphModule with its functions as JSON."""

from __future__ import annotations

import json
import keyword
import math
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn

from squareq_fx.ir import Info, functions
from squareq_fx.stored.errors import DamagedError, UnstorableError
from squareq_fx.stored.values import ValueReader, ValueWriter

__all__ = ["GraphReader", "GraphWriter"]

_MODULES = {"_operator": operator, "operator": operator, "math": math, "torch": torch}
_OPERATIONS = ("placeholder", "call_function", "call_module", "output")


class GraphWriter:
    """Writes graphs. Sources and types that many nodes share are written once, in `tables`."""

    def __init__(self, values: ValueWriter) -> None:
        self._values = values
        self._texts: dict[str, int] = {}

    def tables(self) -> dict[str, Any]:
        return {"types": self._values.types, "texts": list(self._texts)}

    def write(self, gm: fx.GraphModule) -> dict[str, Any]:
        """The graph and its functions, without the program record.

        Raises:
            UnstorableError: a node holds what cannot be written.
        """
        numbers: dict[fx.Node, int] = {}
        nodes = []
        for node in gm.graph.nodes:
            nodes.append(self._node(node, numbers.__getitem__))
            numbers[node] = len(numbers)
        children = {name: self.write(child) for name, child in functions(gm).items()}
        return {"name": gm._get_name(), "nodes": nodes, "functions": children}

    def _node(self, node: fx.Node, number: Callable[[fx.Node], int]) -> list[Any]:
        if node.op not in _OPERATIONS:
            raise UnstorableError(f"{node.op} nodes are not written")
        stack = {k: [path, _class_name(cls)] for k, (path, cls) in (node.meta.get("nn_module_stack") or {}).items()}
        values = self._values
        return [
            node.op,
            node.name,
            _target(node),
            values.write(node.args, number),
            values.write(node.kwargs, number),
            values.write(node.meta["val"]) if "val" in node.meta else ["none"],
            values.write(node.meta["squareq"]) if "squareq" in node.meta else None,
            self._text(node.meta.get("stack_trace")),
            self._text(json.dumps(stack) if stack else None),
        ]

    def _text(self, text: str | None) -> int:
        return -1 if text is None else self._texts.setdefault(text, len(self._texts))


class GraphReader:
    """Reads graphs that share `tables`."""

    def __init__(self, values: ValueReader, tables: dict[str, Any]) -> None:
        self.values = values
        self._types = values.types(tables["types"])
        self._texts: list[str] = tables["texts"]
        self._stacks: dict[int, dict[str, Any]] = {}

    def value(self, written: Any) -> Any:
        """A value outside a graph."""
        return self.values.read(written, self._types)

    def read(self, written: dict[str, Any]) -> fx.GraphModule:
        """The graph and its functions.

        Raises:
            DamagedError: nothing writes this.
        """
        root = nn.Module()
        for name, child in written["functions"].items():
            root.add_module(_identifier(name), self.read(child))
        graph = fx.Graph()
        nodes: list[fx.Node] = []
        for entry in written["nodes"]:
            nodes.append(self._node(graph, nodes, root, *entry))
        return fx.GraphModule(root, graph, class_name=_identifier(written["name"]))

    def _node(
        self,
        graph: fx.Graph,
        nodes: list[fx.Node],
        root: nn.Module,
        op: str,
        name: str,
        target: Any,
        args: Any,
        kwargs: Any,
        val: Any,
        record: Any,
        trace: int,
        stack: int,
    ) -> fx.Node:
        found_args, found_kwargs = (self.values.read(v, self._types, nodes) for v in (args, kwargs))
        of_kinds = op in _OPERATIONS and isinstance(found_args, tuple) and isinstance(found_kwargs, dict)
        if not of_kinds or not all(map(_identifier, found_kwargs)):
            raise DamagedError(f"{name!r} is no node")
        node = graph.create_node(op, _found(op, target, root), found_args, found_kwargs, name=_identifier(name))
        if node.name != name:
            node.name = name
        if val != ["none"]:
            node.meta["val"] = self.values.read(val, self._types)
        if trace >= 0:
            node.meta["stack_trace"] = self._texts[trace]
        if stack >= 0:
            if stack not in self._stacks:
                self._stacks[stack] = {k: tuple(entry) for k, entry in json.loads(self._texts[stack]).items()}
            node.meta["nn_module_stack"] = self._stacks[stack]
        if record is not None:
            node.meta["squareq"] = self.values.read(record, self._types)
            if not isinstance(node.meta["squareq"], Info):
                raise DamagedError(f"{name!r} has no record of a node")
        return node


def _class_name(cls: Any) -> str:
    return cls if isinstance(cls, str) else f"{cls.__module__}.{cls.__qualname__}"


def _target(node: fx.Node) -> Any:
    target: Any = node.target
    if isinstance(target, str):
        return target
    if isinstance(target, torch._ops.OpOverload):
        namespace, _, name = target._schema.name.partition("::")
        return ["operation", namespace, name, target._overloadname]
    module, name = getattr(target, "__module__", ""), getattr(target, "__name__", "")
    if _python_function(module, name) is not target:
        raise UnstorableError(f"calls of {target} are not written")
    return ["function", module, name]


def _found(op: str, target: Any, root: nn.Module) -> Any:
    """What a node calls: a registered operation, a function of arithmetic on sizes, or one of the graph's own functions."""
    match target:
        case ["operation", str(namespace), str(name), str(overload)] if op == "call_function":
            packet = getattr(getattr(torch.ops, namespace), name, None)
            found = getattr(packet, overload, None)
            if isinstance(found, torch._ops.OpOverload):
                return found
        case ["function", str(module), str(name)] if op == "call_function":
            function = _python_function(module, name)
            if function is not None:
                return function
        case str() if op == "call_module" and isinstance(root._modules.get(target), fx.GraphModule):
            return target
        case str() if op in ("placeholder", "output"):
            return _identifier(target)
    raise DamagedError(f"{target!r} is nothing a {op} node may name")


def _python_function(module: str, name: str) -> Any:
    home = _MODULES.get(module)
    allowed = name.startswith(("sym_", "_sym_")) if home is torch else not name.startswith("_") and name != "call"
    found = getattr(home, name, None) if home is not None and allowed else None
    return found if callable(found) and not isinstance(found, type) else None


def _identifier(name: Any) -> str:
    """A name that the generated code of a graph may hold."""
    if not isinstance(name, str) or not name.isidentifier() or keyword.iskeyword(name):
        raise DamagedError(f"{name!r} is no name")
    return name
