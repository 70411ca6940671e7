"""Products that read one input become one product, and what follows a product becomes its epilogue."""

from __future__ import annotations

import itertools
import math
import operator
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from squareq_fx import ops
from squareq_fx.edit import arguments, call, finish, replace
from squareq_fx.epilogues import fold_epilogues
from squareq_fx.errors import PassError
from squareq_fx.ir import Level, clone, functions, info, join_layers, layers, model_source, set_info
from squareq_fx.specs import spec

__all__ = ["Fuse"]

_PRODUCTS = (ops.int8_matmul, ops.int8_linear, ops.int8_linear_parts)
_WEIGHTS = ("qweight", "scale", "zero_point", "bias")
_SELECT = torch.ops.aten.select.int


@dataclass(frozen=True)
class Fuse:
    """Fewer and larger INT8 products inside every function.

    Equal `quantize_rows` and `unpack` become one, and two tensors side by side that one `quantize_rows` alone reads are not
    put together (always):

        y = aten.cat([attn, mlp], 2);  xq, sx = squareq.quantize_rows(y)     ->     xq, sx = squareq.quantize_rows(attn, mlp)

    Then, for layers of one height that read one input and whose rows
    lie side by side in the block's buffer (`segment_layout` puts q, k and v so):

        q = squareq.int8_matmul(xq, sx, to_q_qweight, ...)      y = squareq.int8_matmul(xq, sx, to_q_k_v_qweight, ..., parts=3)
        k = squareq.int8_matmul(xq, sx, to_k_qweight, ...)  ->  q, k, v = y[0], y[1], y[2]
        v = squareq.int8_matmul(xq, sx, to_v_qweight, ...)

    and for a product that one operation alone reads:

        y = squareq.int8_matmul(...);  z = aten.gelu(y)             ->     z = squareq.int8_matmul(..., 'gelu')
        y = squareq.int8_matmul(...);  z = aten.add(y, residual)    ->     z = squareq.int8_matmul(..., 'none', residual)

    Args:
        merge: products of one input, both `int8_matmul` and w8a16 `int8_linear`.
        epilogue: gelu, silu and an addition of equal shape and type, into `int8_matmul`; first the one, then the other. A
            division by 1 between them is dropped.

    Requires: a streamed graph; works on functions, whose weights are views of one buffer.   Preserves: signature, every type.
    Values: sharing changes no bit, and merging changes none of an `int8_matmul`, whose sums are exact; a merged `int8_linear`
    may sum in another order. An epilogue rounds once, at the end, where each operation rounded: with u half a step of the
    result's type (2^-9 for bf16), y the product and a its activation (y, if none), to first order in u,
    |fused - unfused| <= u * (1.13 |y| + |a| + 2 |result|).

    Raises:
        PassError: a part of a merged product has another type than the product it stands for.
    """

    merge: bool = True
    epilogue: bool = True

    name = "fuse"
    requires_level = Level.STREAMED

    def __call__(self, gm: fx.GraphModule) -> fx.GraphModule:
        gm = clone(gm)
        for function in functions(gm).values():
            function.graph.eliminate_dead_code()
            _share(function.graph)
            _read_both(function.graph)
            if self.merge:
                for products in _neighbours(function.graph):
                    _merge(function.graph, products)
            if self.epilogue:
                fold_epilogues(function.graph)
            finish(function)
        return finish(gm)

    def ensures(self, before: fx.GraphModule, after: fx.GraphModule) -> None:
        """Every layer is computed as often as before, from the same bytes of the block.

        Raises:
            PassError: naming the layer.
        """
        wanted, found = _computed(before), _computed(after)
        for function, layer, places in (wanted - found) | (found - wanted):
            times = wanted[function, layer, places], found[function, layer, places]
            raise PassError(
                f"function {function} computed layer {layer} {times[0]} times from bytes {places}, and now {times[1]} times"
            )


def _computed(gm: fx.GraphModule) -> Counter[tuple[str, str, tuple[Any, ...]]]:
    """How often each function computes each layer from which bytes of its buffer."""
    count: Counter[tuple[str, str, tuple[Any, ...]]] = Counter()
    for name, function in functions(gm).items():
        for node in function.graph.nodes:
            if node.target in _PRODUCTS and node.users:
                given = arguments(node)
                parts = int(given.get("parts", 1))
                named = layers(node) or ("",)
                if len(named) != parts:
                    raise PassError(f"{node.name} computes {parts} layers and names {', '.join(named)}")
                for i, layer in enumerate(named):
                    count[name, layer, tuple(_place(given[key], i, parts) for key in _WEIGHTS)] += 1
    return count


def _place(weight: fx.Node | None, part: int, parts: int) -> Any:
    if weight is None or weight.target is not ops.unpack:
        return None if weight is None else weight.name
    nbytes = _nbytes(weight) // parts
    return int(weight.args[1]) + part * nbytes, nbytes  # type: ignore[arg-type]


# -------------------------------------------------------------------------------------------------------- sharing


def _share(graph: fx.Graph) -> None:
    """Of equal quantisations and views the first stays."""
    seen: dict[tuple[Any, str, str], fx.Node] = {}
    for node in list(graph.nodes):
        item = node.target is operator.getitem and node.args[0].target is ops.quantize_rows
        if not item and node.target not in (ops.quantize_rows, ops.unpack):
            continue
        key = (node.target, str(node.args), str(node.kwargs))
        first = seen.setdefault(key, node)
        if first is not node:
            set_info(first, layer=join_layers([*layers(first), *layers(node)]))
            replace(node, first)


def _read_both(graph: fx.Graph) -> None:
    """Rows that were put together to be quantised are quantised where they are."""
    for node in graph.find_nodes(op="call_function", target=ops.quantize_rows):
        whole = node.args[0]
        if whole.target is not torch.ops.aten.cat.default or set(whole.users) != {node}:
            continue
        given, val = arguments(whole), whole.meta["val"]
        pieces = given["tensors"]
        alike = all(p.meta["val"].dim() == val.dim() and p.meta["val"].dtype == val.dtype for p in pieces)
        if len(pieces) == 2 and alike and given["dim"] % val.dim() == val.dim() - 1:
            node.args = tuple(pieces)
            graph.erase_node(whole)


# -------------------------------------------------------------------------------------------------------- merging


def _neighbours(graph: fx.Graph) -> list[list[fx.Node]]:
    """Products of one input and one height whose weights lie side by side, in the order of their rows."""
    alike: dict[tuple[Any, ...], list[fx.Node]] = {}
    for node in graph.nodes:
        key = _alike(node)
        if key is not None:
            alike.setdefault(key, []).append(node)
    found = []
    for products in alike.values():
        runs: list[list[fx.Node]] = []
        for node in sorted(products, key=lambda n: arguments(n)["qweight"].args[1]):
            if runs and _adjoin(runs[-1][-1], node):
                runs[-1].append(node)
            else:
                runs.append([node])
        found += [run for run in runs if len(run) > 1]
    return found


def _alike(node: fx.Node) -> tuple[Any, ...] | None:
    """What products that may be merged have in common; None for a node that is none."""
    if node.target not in (ops.int8_matmul, ops.int8_linear):
        return None
    given = arguments(node)
    weights = [given[key] for key in _WEIGHTS if given[key] is not None]
    rest = {key: value for key, value in given.items() if key not in _WEIGHTS}
    is_plain = all(rest.get(key, value) == value for key, value in _PLAIN.items()) and len(layers(node)) == 1
    if not is_plain or any(w.target is not ops.unpack or not _nbytes(w) for w in weights):
        return None
    return (node.target, *rest.values(), *((w.args[0], str(w.args[2:])) for w in weights))


_PLAIN = {"compute": "w8a16", "activation": "none", "addend": None, "parts": 1}


def _adjoin(above: fx.Node, below: fx.Node) -> bool:
    pairs = [(arguments(above)[key], arguments(below)[key]) for key in _WEIGHTS]
    return all(a is b is None or a.args[1] + _nbytes(a) == b.args[1] for a, b in pairs)


def _merge(graph: fx.Graph, products: Sequence[fx.Node]) -> None:
    given = [arguments(node) for node in products]
    place = {node: i for i, node in enumerate(graph.nodes)}
    first = min(products, key=place.__getitem__)
    weights = {key: _unpack_together(graph, [g[key] for g in given], place) for key in _WEIGHTS}
    target = ops.int8_matmul if first.target is ops.int8_matmul else ops.int8_linear_parts
    wanted = given[0] | weights | {"parts": len(products)}
    with graph.inserting_before(first):
        merged = call(
            graph,
            target,
            tuple(wanted[a.name] for a in target._schema.arguments),
            like=first,
            made_by="fuse",
            layer=join_layers(str(info(node).layer) for node in products),
            name=_joined([node.name for node in products]),
        )
        taken = [
            call(graph, _SELECT, (merged, 0, i), like=node, made_by="fuse", layer=info(node).layer)
            for i, node in enumerate(products)
        ]
    for part, node in zip(taken, products):
        if spec(part.meta["val"]) != spec(node.meta["val"]):
            types = f"{spec(part.meta['val'])}, not {spec(node.meta['val'])}"
            raise PassError(f"the part of {merged.name} that stands for {node.name} is {types}\n  {model_source(node)}")
        replace(node, part)
        part.name = node.name


def _unpack_together(graph: fx.Graph, views: list[fx.Node | None], place: dict[fx.Node, int]) -> fx.Node | None:
    """One view of the rows of all; where the first of them is made."""
    found = [view for view in views if view is not None]
    if not found:
        return None
    first: Any = found[0]
    buffer, offset, (height, *width), dtype = first.args
    rows = [height * len(found), *width]
    with graph.inserting_before(min(found, key=place.__getitem__)):
        name = _joined([view.name for view in found])
        whole = call(graph, ops.unpack, (buffer, offset, rows, dtype), like=first, made_by="fuse", name=name)
    return set_info(whole, key=join_layers(str(info(view).key) for view in found))


def _joined(names: Sequence[str]) -> str:
    """`attn_to_q_qweight`, `attn_to_k_qweight`: `attn_to_q_k_qweight`."""
    words = [name.split("_") for name in names]
    start = len(list(itertools.takewhile(lambda same: len(set(same)) == 1, zip(*words))))
    rest = [w[start:] for w in words]
    end = len(list(itertools.takewhile(lambda same: len(set(same)) == 1, zip(*(w[::-1] for w in rest)))))
    middle = [word for w in rest for word in w[: len(w) - end]]
    return "_".join([*words[0][:start], *middle, *rest[0][len(rest[0]) - end :]])


def _nbytes(view: Any) -> int:
    _, _, size, dtype = view.args
    return math.prod(size) * dtype.itemsize
