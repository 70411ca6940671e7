"""A graph as Python that a person can read and Python can run."""

from __future__ import annotations

import difflib
import math
import operator
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from squareq_fx.attention_op import attention_summary
from squareq_fx.ir import functions, info
from squareq_fx.specs import short_spec
from squareq_fx.views.explain import compute_summary

__all__ = ["diff", "show"]

_INFIX = {
    operator.add: "+", operator.sub: "-", operator.mul: "*", operator.floordiv: "//", operator.truediv: "/",
    operator.mod: "%", operator.pow: "**", operator.eq: "==", operator.ne: "!=", operator.lt: "<", operator.le: "<=",
    operator.gt: ">", operator.ge: ">=", operator.and_: "&", operator.or_: "|",
}  # fmt: skip
_HEAD = """import math
import operator
import sys

import torch

import squareq_fx.ops

aten, squareq = torch.ops.aten, torch.ops.squareq
"""
_RESERVED = {"aten", "math", "operator", "self", "squareq", "squareq_fx", "sys", "torch", "forward", "inf", "nan"}


def show(gm: fx.GraphModule, function: str | None = None) -> str:
    """The graph's program text: its unique functions, then `forward`.

    Every value has its type as a comment and is deleted after its last use. The text runs: `exec` it and call `forward` with
    the graph's inputs (first the module itself, if the graph reads parameters of its own). A graph with loads needs an
    active runtime (`squareq_fx.ops.activate`).

    Args:
        gm: a graph at any stage, or a compiled module.
        function: only the unique function of this name.

    Raises:
        KeyError: there is no such function; the message lists them.
    """
    children = functions(gm)
    if function is not None:
        if function not in children:
            raise KeyError(f"there is no function {function!r}; there are {', '.join(children) or 'none'}")
        return "\n".join(_definition(function, children[function], {}))
    calls: dict[str, int] = {}
    for node in gm.graph.nodes:
        if node.op == "call_module":
            calls[str(node.target)] = calls.get(str(node.target), 0) + 1
    attention = attention_summary(gm)
    compute = compute_summary(gm)
    heads = (f"\n# {what}: {text}" for what, text in (("compute", compute), ("attention", attention)) if text)
    parts = ["".join([_HEAD, *heads])]
    for name, child in children.items():
        times = calls.get(name, 0)
        parts.append("\n".join([f"# called {times} time{'s' if times != 1 else ''}", *_definition(name, child, {})]))
    parts.append("\n".join(_definition("forward", gm, children)))
    return "\n\n".join(parts) + "\n"


def diff(before: fx.GraphModule, after: fx.GraphModule) -> str:
    """What changed between two graphs, as a unified diff of their programs.

        stages = {stage.name: stage.graph for stage in gm.history}
        print(squareq_fx.diff(stages["canonicalize"], stages["quantize"]))
    """
    old, new = (show(gm).splitlines() for gm in (before, after))
    return "\n".join(difflib.unified_diff(old, new, "before", "after", n=1, lineterm=""))


def _definition(name: str, gm: fx.GraphModule, children: dict[str, fx.GraphModule]) -> Iterator[str]:
    names = _names(gm, set(children))
    placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
    state = ["self"] if any(n.op == "get_attr" for n in gm.graph.nodes) else []
    yield f"def {name}({', '.join(state + [names[p] for p in placeholders])}):"
    for node in placeholders:
        if info(node).kind != "weight":
            yield f"    # {names[node]}: {short_spec(node.meta.get('val'))}"
    dying = _last_uses(gm)
    for node in gm.graph.nodes:
        if node.op == "placeholder":
            continue
        if node.op == "output":
            yield f"    return {_literal(node.args[0], names)}"
            continue
        gone = f";  del {', '.join(names[d] for d in dying[node])}" if node in dying else ""
        yield f"    {_line(node, names)}{gone}{_comment(node)}"


def _line(node: fx.Node, names: dict[fx.Node, str]) -> str:
    if node.op == "get_attr":
        return f"{names[node]} = operator.attrgetter({node.target!r})(self)"
    expression = _expression(node, names)
    return expression if node.meta.get("val") is None else f"{names[node]} = {expression}"


def _expression(node: fx.Node, names: dict[fx.Node, str]) -> str:
    arguments = [_literal(a, names) for a in node.args]
    if node.target is operator.getitem:
        return f"{arguments[0]}[{arguments[1]}]"
    if node.target is operator.neg:
        return f"-{arguments[0]}"
    if node.target in _INFIX and len(arguments) == 2:
        return f"{arguments[0]} {_INFIX[node.target]} {arguments[1]}"
    arguments += [f"{key}={_literal(value, names)}" for key, value in node.kwargs.items() if value is not None]
    return f"{_target(node)}({', '.join(arguments)})"


def _target(node: fx.Node) -> str:
    if node.op == "call_module":
        return str(node.target)
    target: Any = node.target
    if isinstance(target, torch._ops.OpOverload):
        namespace, name = target._schema.name.split("::")
        prefix = namespace if namespace in ("aten", "squareq") else f"torch.ops.{namespace}"
        overload = target._overloadname
        return f"{prefix}.{name}" if namespace == "squareq" and overload == "default" else f"{prefix}.{name}.{overload}"
    module = getattr(target, "__module__", "") or ""
    return f"{'torch' if module.startswith('torch') else module.strip('_')}.{target.__name__}"


def _literal(value: Any, names: dict[fx.Node, str]) -> str:
    if isinstance(value, fx.Node):
        return names[value]
    if isinstance(value, tuple):
        return f"({', '.join(_literal(v, names) for v in value)}{',' if len(value) == 1 else ''})"
    if isinstance(value, list):
        return f"[{', '.join(_literal(v, names) for v in value)}]"
    if isinstance(value, torch.device):
        return f"torch.device({str(value)!r})"
    if value == sys.maxsize and isinstance(value, int):
        return "sys.maxsize"
    if isinstance(value, float) and not math.isfinite(value):
        return f"float({str(value)!r})"
    return str(value) if isinstance(value, torch.dtype | torch.layout | torch.memory_format) else repr(value)


def _comment(node: fx.Node) -> str:
    val = node.meta.get("val")
    return f"  # {short_spec(val)}" if val is not None else ""


def _names(gm: fx.GraphModule, taken: set[str]) -> dict[fx.Node, str]:
    """A call is not named like the function it calls."""
    used = {n.name for n in gm.graph.nodes}
    names: dict[fx.Node, str] = {}
    for node in gm.graph.nodes:
        name = node.name
        while name in taken | _RESERVED or (name != node.name and name in used):
            name += "_out"
        used.add(name)
        names[node] = name
    return names


def _last_uses(gm: fx.GraphModule) -> dict[fx.Node, list[fx.Node]]:
    seen: set[fx.Node] = set()
    dying: dict[fx.Node, list[fx.Node]] = {}
    for node in reversed(gm.graph.nodes):
        last = [a for a in dict.fromkeys(node.all_input_nodes) if a not in seen]
        seen.update(last)
        unused = [] if node.users or node.meta.get("val") is None or node.op in ("placeholder", "output") else [node]
        if (last or unused) and node.op not in ("output", "placeholder"):
            dying[node] = last + unused
    return dying

