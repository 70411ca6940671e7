"""The rules every graph must keep between passes. Nothing here trusts what a pass says of its result.

`check(gm)` runs all of them; each rule is a function of its own and raises `VerificationError` with the node, the line of the
model's source and what to do.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from squareq_fx import ops
from squareq_fx.attention_op import attention
from squareq_fx.errors import PassError, VerificationError
from squareq_fx.inference import infer
from squareq_fx.ir import Level, fake_mode, functions, info, model_source, program
from squareq_fx.liveness import shared_storage
from squareq_fx.specs import short_spec, spec

__all__ = ["check", "check_lint", "check_operations", "check_residency", "check_values", "fingerprint"]

_SYMBOLIC = {
    operator.getitem, operator.add, operator.sub, operator.mul, operator.floordiv, operator.truediv, operator.mod,
    operator.neg, operator.pow, operator.eq, operator.ne, operator.lt, operator.le, operator.gt, operator.ge,
    operator.and_, operator.or_,
    torch.sym_int, torch.sym_float, torch.sym_max, torch.sym_min, torch.sym_not, torch.sym_ite, torch.sym_sum,
    torch.sym_sqrt,
}  # fmt: skip
_FIRST_LEVEL = {
    ops.int8_linear: Level.QUANTIZED,
    ops.int8_linear_dx: Level.DIFFERENTIATED,
    ops.quantize_rows: Level.QUANTIZED,
    ops.int8_matmul: Level.QUANTIZED,
    ops.int8_linear_parts: Level.STREAMED,
    ops.cotangent: Level.DIFFERENTIATED,
    ops.offload: Level.DIFFERENTIATED,
    ops.fetch: Level.DIFFERENTIATED,
    ops.arrived: Level.DIFFERENTIATED,
    attention: Level.STREAMED,
    ops.load: Level.STREAMED,
    ops.keep: Level.STREAMED,
    ops.evict: Level.STREAMED,
    ops.unpack: Level.STREAMED,
    ops.prefetch: Level.SCHEDULED,
}


def check(gm: fx.GraphModule) -> None:
    """All rules, on the graph and on every function it calls.

    Raises:
        VerificationError: the first rule that is broken.
    """
    level = program(gm).level
    for name, graph in (("", gm), *functions(gm).items()):
        check_lint(graph, name)
        check_operations(graph, level, name)
        check_values(graph, name)
    if level >= Level.STREAMED:
        check_residency(gm)


def fingerprint(gm: fx.GraphModule) -> tuple[Any, ...]:
    """What must not change while a pass looks at its input: text, types, records, functions and constants."""
    nodes = tuple(
        (n.op, n.name, str(n.target), _frozen(n.args), _frozen(n.kwargs), id(n.meta.get("val")), info(n))
        for n in gm.graph.nodes
    )
    record = gm.meta.get("squareq")
    constants = tuple((k, id(t), t._version) for k, t in record.constants.items()) if record is not None else ()
    return nodes, id(record), constants, tuple((k, fingerprint(g)) for k, g in functions(gm).items())


def _frozen(value: Any) -> str:
    return str(value)


def check_lint(gm: fx.GraphModule, where: str = "") -> None:
    """The graph is well formed: every value is made before it is used, and belongs to this graph."""
    try:
        gm.graph.lint()
    except RuntimeError as error:
        raise VerificationError(f"{_in(where)}the graph is malformed: {error}") from error
    for node in gm.graph.nodes:
        if node.op == "get_attr" or node.op == "call_method":
            raise _broken(node, where, f"{node.op} is not part of the IR; make state an input and methods aten operations")
        if node.op == "call_module" and node.target not in functions(gm):
            raise _broken(node, where, f"it calls {node.target!r}, which is not a function of this graph")


def check_operations(gm: fx.GraphModule, level: Level, where: str = "") -> None:
    """Only functional operators, symbolic arithmetic, and what this level allows of ours."""
    for node in gm.graph.nodes:
        if node.op == "call_module" and level < Level.OUTLINED:
            raise _broken(node, where, "calls of functions are allowed after outline only")
        if node.op != "call_function":
            continue
        target = node.target
        if isinstance(target, torch._ops.OpOverload):
            if target._schema.is_mutable:
                raise _broken(node, where, f"{target} writes to its argument; the IR is functional, use its out-of-place form")
            first = _FIRST_LEVEL.get(target, Level.CAPTURED)
            if level < first:
                levels = f"level {first.name.lower()} on, this is {level.name.lower()}"
                raise _broken(node, where, f"{target} is allowed from {levels}")
        elif target not in _SYMBOLIC and getattr(target, "__module__", "") not in ("math", "_operator"):
            raise _broken(node, where, f"{target} is a Python function; register it as an operator with torch.library")


def check_values(gm: fx.GraphModule, where: str = "") -> None:
    """Every `meta["val"]` is what its operation gives for the `val`s of its arguments."""
    mode = fake_mode(gm)
    for node in gm.graph.nodes:
        if node.op == "output":
            continue
        if "val" not in node.meta:
            raise _broken(node, where, "it has no meta['val']; set it, squareq_fx.edit.call does so for you")
        if node.op in ("placeholder", "get_attr"):
            continue
        called = functions(gm).get(str(node.target)) if node.op == "call_module" else None
        inferred = _called_spec(called, node, where) if called is not None else _inferred(node, mode, where)
        stated = spec(node.meta["val"])
        if inferred != stated:
            raise _broken(
                node,
                where,
                f"its meta['val'] is {short_spec(node.meta['val'])} [{stated}], but the operation gives [{inferred}]",
            )


def _inferred(node: fx.Node, mode: Any, where: str) -> str:
    try:
        return spec(infer(node.target, node.args, node.kwargs, mode))  # type: ignore[arg-type]
    except PassError as error:
        raise _broken(node, where, str(error)) from error


def _called_spec(function: fx.GraphModule, node: fx.Node, where: str) -> str:
    placeholders = [n for n in function.graph.nodes if n.op == "placeholder"]
    if len(placeholders) != len(node.args) or node.kwargs:
        raise _broken(node, where, f"{node.target} takes {len(placeholders)} arguments, the call gives {len(node.args)}")
    for placeholder, argument in zip(placeholders, node.args):
        given = spec(argument.meta.get("val")) if isinstance(argument, fx.Node) else spec(argument)
        if given != spec(placeholder.meta.get("val")):
            wanted = spec(placeholder.meta.get("val"))
            raise _broken(node, where, f"argument {placeholder.name} of {node.target} is {given}, the function wants {wanted}")
    output = next(n for n in function.graph.nodes if n.op == "output")
    result = output.args[0]
    if isinstance(result, fx.Node):
        return spec(result.meta["val"])
    return spec(tuple(r.meta["val"] if isinstance(r, fx.Node) else r for r in result))  # type: ignore[union-attr]


def check_residency(gm: fx.GraphModule) -> None:
    """Replay of the graph's loads: one evict for each, no use after it (through views too), no overlap in or beyond the arena.

    A prefetch must name the block, visit, size and offset of a later load, come after the evictions that free its bytes, and
    be issued once.
    """
    roots, arena = shared_storage(gm), program(gm).arena_bytes
    live: dict[tuple[str, int], fx.Node] = {}
    ranges: dict[tuple[str, int], tuple[int, int]] = {}
    evicted: dict[fx.Node, fx.Node] = {}
    pending: dict[tuple[str, int], fx.Node] = {}
    seen: set[tuple[str, int]] = set()
    for node in gm.graph.nodes:
        for source in frozenset().union(*(roots[a] for a in node.all_input_nodes)) if node.all_input_nodes else ():
            if source in evicted:
                raise _broken(node, "", f"it reads {source} after {evicted[source]} gave its bytes away")
        if node.target is ops.prefetch:
            key = (str(node.args[0]), int(node.kwargs["visit"]))  # type: ignore[arg-type]
            if key in pending or key in seen:
                raise _broken(node, "", f"block {key[0]!r} visit {key[1]} is prefetched again or after its load")
            pending[key] = node
            _claim(node, key, ranges, arena)
        elif node.target is ops.load:
            key = (str(node.args[0]), int(node.kwargs["visit"]))  # type: ignore[arg-type]
            if key in seen:
                raise _broken(node, "", f"block {key[0]!r} visit {key[1]} is loaded twice; give each load its own visit")
            seen.add(key)
            earlier = pending.pop(key, None)
            if earlier is None:
                _claim(node, key, ranges, arena)
            elif any(earlier.kwargs.get(k) != node.kwargs.get(k) for k in ("nbytes", "offset")):
                raise _broken(node, "", f"its size or offset is not that of {earlier}")
            live[key] = node
        elif node.target is ops.evict or node.target is ops.keep:
            weights, key = node.args[0], (str(node.args[1]), int(node.args[2]))  # type: ignore[arg-type]
            if live.get(key) is not weights:
                raise _broken(node, "", f"{weights} is not the live load of block {key[0]!r} visit {key[1]}")
            evicted[live.pop(key)] = node
            ranges.pop(key, None)
    for key, node in {**live, **pending}.items():
        what = "never evicted" if node.target is ops.load else "never loaded"
        raise _broken(node, "", f"block {key[0]!r} visit {key[1]} is {what}")


def _claim(node: fx.Node, key: tuple[str, int], ranges: dict[tuple[str, int], tuple[int, int]], arena: int) -> None:
    offset = node.kwargs.get("offset")
    if offset is None:
        return
    start, end = int(offset), int(offset) + int(node.kwargs["nbytes"])  # type: ignore[arg-type]
    if start < 0 or end > arena:
        outside = f"its bytes {start}..{end} lie outside the arena of {arena} bytes"
        raise _broken(node, "", f"{outside}; set the program's arena_bytes")
    for other, (low, high) in ranges.items():
        if start < high and low < end:
            owner = f"block {other[0]!r} visit {other[1]} ({low}..{high})"
            raise _broken(node, "", f"its bytes {start}..{end} of the arena belong to {owner}")
    ranges[key] = (start, end)


def _in(where: str) -> str:
    return f"in function {where}: " if where else ""


def _broken(node: fx.Node, where: str, what: str) -> VerificationError:
    place = f"{_in(where)}node {node.name} ({node.op} {node.target})"
    return VerificationError(f"{place}: {what}\n  model source: {model_source(node)}")

