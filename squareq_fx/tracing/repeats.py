"""Blocks that are one program are traced once. Each further one is a single node of the trace, `squareq::again`, in whose place
`Copies` puts the nodes of the first, with its own weights.

Two calls are of one program if the blocks are equal then, but for their weights' values (`identity`), lie in one list of
modules, and are given tensors of the same sizes, as expressions, strides and dtypes, and otherwise the same arguments. A
forward that writes into tensors is traced whole: what a block wrote to is not seen from outside.
"""

from __future__ import annotations

import contextlib
import inspect
import operator
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import fx, nn
from torch.fx.node import has_side_effect
from torch.utils import _pytree as pytree

from squareq_fx.errors import CaptureError
from squareq_fx.specs import spec

__all__ = ["KEPT_META", "Copies", "Repeats", "again"]

KEPT_META = {"val", "stack_trace", "nn_module_stack"}
"""What is told of a node of a trace."""
_SIMPLE = (bool, int, float, str, type(None))
_SIZES = (bool, int, float, torch.SymBool, torch.SymInt, torch.SymFloat)

_LIBRARY = torch.library.Library("squareq", "FRAGMENT")
for _schema in (
    "enter(Tensor[] given, str path, int call) -> ()",
    "leave(Tensor[] made, int call) -> ()",
    "again(Tensor[] given, str first, str path, int call) -> Tensor[]",
):
    _LIBRARY.define(_schema)
enter, leave, again = (getattr(torch.ops.squareq, name).default for name in ("enter", "leave", "again"))
has_side_effect(enter)
has_side_effect(leave)


@dataclass(frozen=True)
class _Record:
    """What a traced call returned.

    Attributes:
        made: sizes, strides, dtype and device of each tensor it made.
        leaves: the position of each among those made, ("given", position) for a tensor it was given, or None.
    """

    path: str
    made: list[tuple[list[Any], list[Any], torch.dtype, torch.device]]
    leaves: list[Any]
    form: Any


_RECORDS: ContextVar[dict[int, _Record]] = ContextVar("squareq_fx_records")


def _enter(given: Sequence[torch.Tensor], path: str, call: int) -> None:
    pass


def _leave(made: Sequence[torch.Tensor], call: int) -> None:
    pass


def _again(given: Sequence[torch.Tensor], first: str, path: str, call: int) -> list[torch.Tensor]:
    made = _RECORDS.get()[call].made
    return [torch.empty_strided(sizes, strides, dtype=dtype, device=device) for sizes, strides, dtype, device in made]


for _name, _kernel in (("enter", _enter), ("leave", _leave), ("again", _again)):
    _LIBRARY.impl(_name, _kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"squareq::{_name}", _kernel, lib=_LIBRARY)


class Repeats:
    """Lets the blocks of a skeleton be traced once for each program.

    Args:
        module: the skeleton; the blocks' `forward` is replaced.
        blocks: paths of blocks; one that is alone in its list is left alone.
        identity: of a block, but for its weights' values and what it is called with; None if that cannot be told.
    """

    def __init__(self, module: nn.Module, blocks: Sequence[str], identity: Callable[[nn.Module], str | None]) -> None:
        self._identity = identity
        self._records: dict[int, _Record] = {}
        self._calls: dict[Any, int] = {}
        self._count = 0
        lists = Counter(path.rpartition(".")[0] for path in blocks)
        several = [path for path in blocks if lists[path.rpartition(".")[0]] > 1]
        self.found = bool(several)
        for path in several:
            block = module.get_submodule(path)
            instead = partial(self._call, path, block, block.forward)
            instead.__signature__ = inspect.signature(block.forward)  # type: ignore[attr-defined]
            block.forward = instead

    @contextlib.contextmanager
    def tracing(self) -> Iterator[None]:
        """To be entered around a trace."""
        token = _RECORDS.set(self._records)
        try:
            yield
        finally:
            _RECORDS.reset(token)

    def begin(self) -> None:
        """To be called at the start of the model's forward, which one trace may run several times."""
        self._calls.clear()
        self._records.clear()
        self._count = 0

    def _call(self, path: str, block: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        leaves, form = pytree.tree_flatten((args, kwargs))
        given = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        if not all(isinstance(leaf, torch.Tensor) or type(leaf) in _SIMPLE for leaf in leaves):
            return forward(*args, **kwargs)
        others = ["a tensor" if isinstance(leaf, torch.Tensor) else repr(leaf) for leaf in leaves]
        within, state = path.rpartition(".")[0], self._state(block)
        key = (within, state, str(form), *others, *(_position(tensor, given) for tensor in given), *map(_kind, given))
        if key in self._calls:
            call = self._calls[key]
            record = self._records[call]
            made = again(given, record.path, path, call)
            return pytree.tree_unflatten([_result(leaf, made, given) for leaf in record.leaves], record.form)
        self._count, call = self._count + 1, self._count
        enter(given, path, call)
        output = forward(*args, **kwargs)
        results, form = pytree.tree_flatten(output)
        made = []
        for leaf in results:
            if isinstance(leaf, torch.Tensor) and not any(leaf is tensor for tensor in (*given, *made)):
                made.append(leaf)
        leave(made, call)
        if all(leaf is None or isinstance(leaf, torch.Tensor) for leaf in results) and state == self._state(block):
            layouts = [(list(t.shape), list(t.stride()), t.dtype, t.device) for t in made]
            self._records[call] = _Record(path, layouts, [_place(leaf, made, given) for leaf in results], form)
            self._calls[key] = call
        return output

    def _state(self, block: nn.Module) -> Any:
        """What a block is now. One that changes it, a counter that others have too, may do something else the next time."""
        ours = {name: block.__dict__[name] for name in ("forward", "_forward_pre_hooks", "_forward_pre_hooks_with_kwargs")}
        del block.__dict__["forward"]
        block.__dict__.update(dict.fromkeys(list(ours)[1:]))
        try:
            same = self._identity(block)
            return object() if same is None else (same, _class_state(block))
        finally:
            block.__dict__.update(ours)


def _class_state(block: nn.Module) -> frozenset[tuple[str, str, str]]:
    """Plain values that the block's modules have in common: attributes of their classes, globals beside these."""
    classes = {base for module in block.modules() for base in type(module).__mro__}
    own = [cls for cls in classes if cls.__module__.partition(".")[0] not in ("torch", "builtins")]
    places: dict[str, Mapping[str, Any]] = {f"{cls.__module__}.{cls.__qualname__}": vars(cls) for cls in own}
    places |= {cls.__module__: vars(sys.modules[cls.__module__]) for cls in own if cls.__module__ in sys.modules}
    return frozenset(
        (place, name, repr(value)) for place, values in places.items() for name, value in values.items() if _is_plain(value)
    )


def _is_plain(value: Any) -> bool:
    if type(value) in (list, tuple, set, dict):
        inner = [*value.keys(), *value.values()] if isinstance(value, dict) else value
        return all(type(v) in _SIMPLE for v in inner)
    return type(value) in _SIMPLE


def _position(tensor: torch.Tensor, among: Sequence[torch.Tensor]) -> int:
    return next(i for i, other in enumerate(among) if other is tensor)


def _place(leaf: torch.Tensor | None, made: Sequence[torch.Tensor], given: Sequence[torch.Tensor]) -> Any:
    if leaf is None:
        return None
    if any(leaf is tensor for tensor in given):
        return "given", _position(leaf, given)
    return _position(leaf, made)


def _result(place: Any, made: Sequence[torch.Tensor], given: Sequence[torch.Tensor]) -> torch.Tensor | None:
    if place is None:
        return None
    return given[place[1]] if isinstance(place, tuple) else made[place]


def _kind(tensor: torch.Tensor) -> tuple[Any, ...]:
    def told(sizes: Sequence[Any]) -> tuple[Any, ...]:
        return tuple(size if isinstance(size, int) else size.node.expr for size in sizes)

    return tensor.dtype, tensor.device, told(tensor.shape), told(tensor.stride()), tensor.requires_grad


@dataclass
class _Region:
    """The nodes of a call that was traced, between `enter` and `leave`."""

    start: fx.Node
    nodes: list[fx.Node] = field(default_factory=list)
    made: Sequence[fx.Node] = ()


class Copies:
    """Puts the nodes of the first call in the place of each `again`, while a trace is copied into a graph node by node.

    Args:
        graph: what it is copied into.
        env: the graph's nodes for those of the trace, as far as it is copied.
        weight: the input of the graph that is to the block of the second path what a placeholder is to the one of the first.
    """

    def __init__(
        self, graph: fx.Graph, env: dict[fx.Node, fx.Node], weight: Callable[[fx.Node, str, str], fx.Node]
    ) -> None:
        self._graph, self._env, self._weight = graph, env, weight
        self._regions: dict[Any, _Region] = {}
        self._open: _Region | None = None
        self._made: dict[Any, list[fx.Node]] = {}

    def take(self, node: fx.Node) -> bool:
        """Whether the node of the trace is dealt with; it is to be copied otherwise.

        Raises:
            CaptureError: the copy is not what was promised when the call was traced.
        """
        if node.target is enter:
            self._open = self._regions[node.args[2]] = _Region(node)
        elif node.target is leave:
            region = self._regions[node.args[1]]
            region.made, self._open = node.args[0], None  # type: ignore[assignment]
        elif node.target is again:
            self._made[node] = self._copied(self._regions[node.args[3]], node)
        elif node.target is operator.getitem and node.args[0] in self._made:
            new = self._made[node.args[0]][node.args[1]]  # type: ignore[index]
            if spec(new.meta["val"]) != spec(node.meta["val"]):
                raise CaptureError(f"{new} is {spec(new.meta['val'])} where {spec(node.meta['val'])} was traced")
            self._env[node] = new
        else:
            if self._open is not None:
                self._open.nodes.append(node)
            return False
        return True

    def _copied(self, region: _Region, call: fx.Node) -> list[fx.Node]:
        given, first, path, _ = call.args
        assert isinstance(first, str) and isinstance(path, str)
        inside = {a: self._env[b] for a, b in zip(region.start.args[0], given)}  # type: ignore[arg-type, union-attr, index]
        home, away = _visit(region.start, first), _visit(call, path)
        stacks: dict[int, Any] = {}

        def moved(stack: dict[str, Any]) -> dict[str, Any]:
            if id(stack) not in stacks:
                stacks[id(stack)] = {
                    _moved(key, home, away): (_moved(at, first, path), kind) for key, (at, kind) in stack.items()
                }
            return stacks[id(stack)]

        def input_of(node: fx.Node) -> fx.Node:
            if node not in inside:
                inside[node] = self._weight(node, first, path) if node.op == "placeholder" else self._env[node]
            return inside[node]

        for node in region.nodes:
            if isinstance(node.meta.get("val"), _SIZES):
                inside[node] = self._env[node]  # sizes are the same
                continue
            new = inside[node] = self._graph.node_copy(node, input_of)
            new.meta = {key: value for key, value in node.meta.items() if key in KEPT_META}
            if new.meta.get("nn_module_stack"):
                new.meta["nn_module_stack"] = moved(new.meta["nn_module_stack"])
        return [input_of(node) for node in region.made]


def _visit(node: fx.Node, path: str) -> str:
    """The key of a block in a node's stack, which tells calls of one block apart."""
    return next(key for key, (at, _) in node.meta["nn_module_stack"].items() if at.partition("@")[0] == path)


def _moved(name: str, old: str, new: str) -> str:
    return new + name[len(old) :] if name == old or name.startswith((f"{old}.", f"{old}@")) else name
