"""The flat graph is cut into blocks; blocks of one structure share one function."""

from __future__ import annotations

import itertools
import keyword
import operator
import re
from dataclasses import dataclass, field

import torch
from torch import fx
from torch.fx.node import map_arg

from squareq_fx.edit import finish
from squareq_fx.ir import (
    Level,
    adapter_inputs,
    clone,
    identifier,
    info,
    operation_name,
    program,
    set_info,
    update_program,
    weight_inputs,
)
from squareq_fx.slab.layout import segment_layout
from squareq_fx.specs import spec

__all__ = ["Outline"]


@dataclass(frozen=True)
class Outline:
    """Each streaming block, and each stretch of nodes between two blocks, becomes a call of a function.

    Args:
        min_nodes: a stretch between blocks that reads no weight and has fewer nodes stays as it is.

    Requires: a flat graph.   Preserves: signature, every value bit for bit; inlining gives the flat graph back.
    Two blocks share a function when their nodes, types (sizes, strides, device) and weight layout are the same. A function
    takes the block's weights first, in the order of `segment_layout`, then its data, then its adapters; sizes it can read off
    its data are not arguments.
    """

    min_nodes: int = 4

    name = "outline"
    requires_level = Level.CAPTURED

    def __call__(self, gm: fx.GraphModule) -> fx.GraphModule:
        gm = clone(gm)
        if program(gm).level >= Level.OUTLINED:
            return gm
        sizes = _hoistable_sizes(gm)
        runs = [run for run in _runs(gm, sizes) if run.block or run.weights or len(run.nodes) >= self.min_nodes]
        _hoist(gm, sizes)
        names = _segment_names(runs)
        names_of_weights = {key.partition(".")[0] for key in (*weight_inputs(gm), *adapter_inputs(gm))}
        shared: dict[str, str] = {}
        visits: dict[str, int] = {}
        for run, name in zip(runs, names):
            function, arguments, outputs = _function(run)
            key = _structure(function)
            if key not in shared:
                shared[key] = _function_name(run, name, names_of_weights | set(shared.values()))
                gm.add_module(shared[key], function)
            visits[name] = visits.get(name, -1) + 1
            label = identifier(name) + (f"_v{visits[name]}" if visits[name] else "")
            _call(gm, shared[key], name, label, arguments, outputs, run)
        finish(gm)
        return update_program(gm, level=Level.OUTLINED)


@dataclass
class _Run:
    """Consecutive nodes of one visit of a block (`block` is its path), or of none."""

    visit: str | None
    block: str | None
    kind: str
    nodes: list[fx.Node] = field(default_factory=list)

    @property
    def weights(self) -> list[fx.Node]:
        """Weight inputs the run reads, in the order of their flat layout."""
        read = {a for n in self.nodes for a in n.all_input_nodes if a.op == "placeholder" and info(a).kind == "weight"}
        by_key = {str(info(w).key): w for w in read}
        layout = segment_layout([(k, w.meta["val"].numel() * w.meta["val"].element_size()) for k, w in by_key.items()])
        return [by_key[key] for key, _ in layout]


def _hoistable_sizes(gm: fx.GraphModule) -> set[fx.Node]:
    """Integer nodes that need nothing but the graph's inputs: they belong to no block."""
    found: set[fx.Node] = set()
    for node in gm.graph.nodes:
        is_size = node.op == "call_function" and isinstance(node.meta.get("val"), torch.SymInt | int)
        if is_size and all(a.op == "placeholder" or a in found for a in node.all_input_nodes):
            found.add(node)
    return found


def _hoist(gm: fx.GraphModule, sizes: set[fx.Node]) -> None:
    anchor = next(n for n in gm.graph.nodes if n.op != "placeholder")
    with gm.graph.inserting_before(anchor):
        for node in [n for n in gm.graph.nodes if n in sizes]:
            if node is anchor:
                anchor = node.next
                continue
            anchor.prepend(node)


def _runs(gm: fx.GraphModule, sizes: set[fx.Node]) -> list[_Run]:
    blocks = set(program(gm).block_paths)
    runs: list[_Run] = []
    for node in gm.graph.nodes:
        if node.op in ("placeholder", "output") or node in sizes:
            continue
        visit, path, kind = _visit(node, blocks)
        if not runs or (runs[-1].visit != visit and node.meta.get("nn_module_stack")):
            runs.append(_Run(visit, path, kind))
        runs[-1].nodes.append(node)
    return runs


def _visit(node: fx.Node, blocks: set[str]) -> tuple[str | None, str | None, str]:
    """The visit of a block the node was traced in; a module called twice has two (`torch.export` marks them `@1`)."""
    for key, (path, cls) in (node.meta.get("nn_module_stack") or {}).items():
        path = path.partition("@")[0]
        if path in blocks:
            return key, path, cls if isinstance(cls, str) else cls.__qualname__
    return None, None, ""


def _segment_names(runs: list[_Run]) -> list[str]:
    """A block's segment is its path; between blocks it is named after the modules it runs."""
    names: list[str] = []
    with_blocks = [i for i, run in enumerate(runs) if run.block]
    for i, run in enumerate(runs):
        if run.block:
            names.append(run.block)
        elif not with_blocks:
            names.append("model")
        elif i < with_blocks[0]:
            names.append("prologue")
        elif i > with_blocks[-1]:
            names.append("epilogue")
        else:
            owners = [str(info(w).key).rpartition(".")[0] for w in run.weights]
            names.append(f"glue.{_first_owner(run, owners)}" if owners else f"glue.after.{names[-1]}")
    return _told_apart(names, runs)


def _told_apart(names: list[str], runs: list[_Run]) -> list[str]:
    """Two runs may have one name only if they read the same weights (two visits of one block)."""
    weights: dict[str, list[fx.Node]] = {}
    result = []
    for name, run in zip(names, runs):
        unique, count = name, 1
        while unique in weights and weights[unique] != run.weights:
            count += 1
            unique = f"{name}.{count}"
        weights[unique] = run.weights
        result.append(unique)
    return result


def _first_owner(run: _Run, owners: list[str]) -> str:
    for node in run.nodes:
        for argument in node.all_input_nodes:
            owner = str(info(argument).key).rpartition(".")[0]
            if info(argument).kind == "weight" and owner in owners:
                return owner
    return owners[0]


def _function(run: _Run) -> tuple[fx.GraphModule, list[fx.Node], list[fx.Node]]:
    """The run as a function, the nodes its call takes, and the nodes it returns."""
    inside = set(run.nodes)
    weights = run.weights
    outside = [a for n in run.nodes for a in n.all_input_nodes if a not in inside and a not in weights]
    tensors = dict.fromkeys(a for a in outside if isinstance(a.meta["val"], torch.Tensor))
    data = sorted(tensors, key=lambda a: info(a).kind == "adapter")
    others = list(dict.fromkeys(a for a in outside if not isinstance(a.meta["val"], torch.Tensor)))
    outputs = [n for n in run.nodes if any(u not in inside for u in n.users)]

    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    prefix = run.block or _common_owner([str(info(w).key) for w in weights])
    for node in weights:
        key = str(info(node).key)
        local = key.removeprefix(prefix + ".") if prefix else key
        env[node] = _parameter(graph, node, local)
    for node in data:
        env[node] = _parameter(graph, node, _argument_name(node, prefix, run))
    derived = {node: found for node in others if (found := _readable(node, data)) is not None}
    for node in others:
        if node not in derived:
            env[node] = _parameter(graph, node, node.name)
    for node, (tensor, dim) in derived.items():
        env[node] = graph.call_function(torch.ops.aten.sym_size.int, (env[tensor], dim))
        env[node].meta["val"] = tensor.meta["val"].shape[dim]
        set_info(env[node], made_by="outline")
    for node in run.nodes:
        args, kwargs = map_arg((node.args, node.kwargs), env.__getitem__)
        new = graph.create_node("call_function", node.target, args, kwargs, name=_local_name(node, run))
        new.meta = dict(node.meta)
        env[node] = new
    results = [env[n] for n in outputs]
    graph.output(results[0] if len(results) == 1 else tuple(results))
    arguments = [*weights, *data, *(n for n in others if n not in derived)]
    return fx.GraphModule({}, graph, class_name="Function"), arguments, outputs


def _argument_name(node: fx.Node, prefix: str, run: _Run) -> str:
    """An adapter's name within the block, what the block calls the value in its own forward, or the value's own name."""
    if info(node).kind == "adapter":
        return str(info(node).key).removeprefix(f"{prefix}.").removesuffix(".weight")
    return dict(info(node).arguments).get(str(run.block), node.name)


def _common_owner(keys: list[str]) -> str:
    """The longest module path all keys lie under."""
    paths = [key.split(".")[:-1] for key in keys]
    common = itertools.takewhile(lambda parts: len(set(parts)) == 1, zip(*paths))
    return ".".join(parts[0] for parts in common)


def _parameter(graph: fx.Graph, node: fx.Node, name: str) -> fx.Node:
    new = graph.placeholder(identifier(name).lower())
    new.meta["val"] = node.meta["val"]
    record = info(node)
    kind = record.kind if record.kind in ("weight", "adapter") else "input"
    return set_info(new, kind=kind, key=name, made_by="outline")


def _readable(size: fx.Node, data: list[fx.Node]) -> tuple[fx.Node, int] | None:
    """A data input and dimension whose size is this integer."""
    wanted = spec(size.meta["val"])
    for node in data:
        for dim, extent in enumerate(node.meta["val"].shape):
            if isinstance(extent, torch.SymInt) and spec(extent) == wanted:
                return node, dim
    return None


def _local_name(node: fx.Node, run: _Run) -> str:
    """An int8 node is called after its layer, without the block's path; any other after its operation."""
    layer = info(node).layer
    if layer is None:
        return operation_name(node.target)
    return identifier(layer.removeprefix(f"{run.block}.") if run.block else layer)


def _structure(function: fx.GraphModule) -> str:
    """Text that is equal exactly for functions that compute the same on the same types, whatever their names are."""
    number = {node: f"%{i}" for i, node in enumerate(function.graph.nodes)}
    lines = []
    for node in function.graph.nodes:
        if node.op == "placeholder":
            lines.append(f"{info(node).kind} {spec(node.meta['val'])}")
        else:
            arguments = map_arg((node.args, node.kwargs), lambda n: _Numbered(number[n]))
            lines.append(f"{node.op} {node.target} {arguments} {spec(node.meta.get('val'))}")
    return "\n".join(lines)


class _Numbered(str):
    def __repr__(self) -> str:
        return str(self)


# What a function may not be called: attributes a GraphModule or the emitted module has, and words of Python.
_RESERVED = {
    *dir(fx.GraphModule(torch.nn.Module(), fx.Graph())),
    *("config", "device", "dtype", "history", "last_step", "runtime", "shutdown"),
    *keyword.kwlist,
}


def _function_name(run: _Run, segment: str, taken: set[str]) -> str:
    base = _snake(run.kind.rpartition(".")[2]) if run.block else identifier(segment.partition(".")[0])
    if base in _RESERVED:
        base += "_function"
    name, count = base, 1
    while name in taken:
        count += 1
        name = f"{base}_{count}"
    return name


def _snake(name: str) -> str:
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()


def _call(
    gm: fx.GraphModule,
    function: str,
    segment: str,
    label: str,
    arguments: list[fx.Node],
    outputs: list[fx.Node],
    run: _Run,
) -> None:
    graph = gm.graph
    source = run.nodes[0].meta
    with graph.inserting_before(run.nodes[0]):
        # Later arguments may be made after the run's first node only if they belong to another run, which comes first.
        node = graph.create_node("call_module", function, tuple(arguments), name=label)
    results: list[fx.Node] = [node]
    if len(outputs) == 1:
        node.meta["val"] = outputs[0].meta["val"]
    else:
        node.meta["val"] = tuple(o.meta["val"] for o in outputs)
        results = []
        for i, output in enumerate(outputs):
            called = info(output).arguments[0][1] if info(output).arguments else str(i)
            name = identifier(f"{label}_{called}")
            with graph.inserting_before(run.nodes[0]):
                item = graph.create_node("call_function", operator.getitem, (node, i), name=name)
            item.meta["val"] = output.meta["val"]
            results.append(set_info(item, made_by="outline", arguments=info(output).arguments))
    for key in ("stack_trace", "nn_module_stack"):
        if key in source:
            node.meta[key] = source[key]
    single = info(outputs[0]).arguments if len(outputs) == 1 else ()
    set_info(node, made_by="outline", key=segment, arguments=single)
    inside = set(run.nodes)
    for old, new in zip(outputs, results):
        old.replace_all_uses_with(new, delete_user_cb=lambda user: user not in inside)
    for old in reversed(run.nodes):
        graph.erase_node(old)


