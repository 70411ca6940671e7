"""From an exported program to a graph of ours: every weight an input under its own name, on the device it will run on."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree

from squareq_fx.errors import CaptureError
from squareq_fx.inference import infer
from squareq_fx.ir import fake_mode, identifier, info, set_info
from squareq_fx.ops import argument
from squareq_fx.specs import spec
from squareq_fx.tracing.export import Skeleton
from squareq_fx.tracing.repeats import KEPT_META, Copies
from squareq_fx.tracing.skeleton import plain_tensors

__all__ = ["explicit", "relocate", "tied_names"]


def explicit(exported: Any, traced: Skeleton, paths: list[str], model: nn.Module) -> fx.GraphModule:
    """The exported graph with readable placeholder names, our records, and without the helper inputs."""
    kinds = torch.export.graph_signature.InputKind
    written = [s for s in exported.graph_signature.output_specs if s.kind.name != "USER_OUTPUT"]
    if written:
        raise CaptureError(
            f"{traced.model_name}: forward writes to {written[0].target or 'an input'}; a compiled module keeps no "
            "state between calls. Call model.eval(), or move that state into the inputs."
        )
    specs = list(exported.graph_signature.input_specs)
    users = [f"\0{name}" for name in traced.tokens] + paths
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    tokens: dict[fx.Node, str] = {}
    placeholders = [n for n in exported.graph.nodes if n.op == "placeholder"]
    ordered = sorted(zip(placeholders, specs), key=lambda pair: pair[1].kind != kinds.USER_INPUT)
    position = iter(users)
    tied = tied_names(model)
    made: dict[str, fx.Node] = {}
    weights: dict[fx.Node, str] = {}
    attributes = set(traced.constants)
    for node, given in ordered:
        if given.kind == kinds.USER_INPUT:
            key, kind = next(position), "input"
            if key.startswith("\0"):
                tokens[node] = key[1:]
                continue
        else:
            key, kind = _weight_key(given, exported, traced), "weight"
            weights[node] = key
            key = tied.get(key, key)
            if key in made:
                env[node] = made[key]
                continue
        new = graph.placeholder(identifier(key))
        new.meta = {k: v for k, v in node.meta.items() if k in KEPT_META}
        set_info(new, kind=kind, key=key)
        env[node] = made[key] = new
    env.update(_spell_tokens(graph, tokens, traced, [n for n in graph.nodes if info(n).kind == "input"]))

    def weight(node: fx.Node, first: str, path: str) -> fx.Node:
        key = weights.get(node, "")
        if not key.startswith(f"{first}.") or (key in traced.constants and key not in attributes):
            return env[node]  # what the forward makes of Python's numbers is the same for both
        moved = path + key[len(first) :]
        if tied.get(moved, moved) not in made:
            raise CaptureError(f"{traced.model_name}: {moved} is no input of the trace")
        return made[tied.get(moved, moved)]

    copies = Copies(graph, env, weight)
    for node in exported.graph.nodes:
        if node.op == "placeholder" or copies.take(node) or node in env:
            continue
        if node.target is argument:
            named = env[node.args[0]]
            set_info(named, arguments=(*info(named).arguments, (str(node.args[1]), str(node.args[2]))))
            continue
        if node.op == "get_attr":
            raise CaptureError(f"{traced.model_name}: control flow with its own subgraph ({node.target}) is not supported")
        env[node] = graph.node_copy(node, env.__getitem__)
        env[node].meta = {k: v for k, v in node.meta.items() if k in KEPT_META}
    gm = fx.GraphModule({}, graph, class_name=type(model).__name__)
    gm.graph.eliminate_dead_code()
    return gm


def tied_names(model: nn.Module) -> dict[str, str]:
    """For every further name of a parameter or buffer the one it goes by: the first outside a Linear, else the first.

    So a tensor is one input of the graph however often it is registered, and a Linear that shares the weight of an embedding
    can be quantised while the embedding keeps the tensor.
    """
    names: dict[int, list[tuple[bool, str]]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for leaf, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is not None:
                names.setdefault(id(tensor), []).append((isinstance(module, nn.Linear), f"{path}.{leaf}" if path else leaf))
    groups = [(min(group, key=lambda entry: entry[0])[1], group) for group in names.values() if len(group) > 1]
    return {name: key for key, group in groups for _, name in group if name != key}


def _weight_key(spec: Any, exported: Any, traced: Skeleton) -> str:
    key = spec.target
    if spec.kind.name == "CONSTANT_TENSOR" and key not in traced.constants:
        value = exported.constants[key]
        known = next((path for path, tensor in plain_tensors(traced.module) if tensor is value), None)
        if known in traced.constants:
            return known
        if value.is_meta or isinstance(value, FakeTensor):
            raise CaptureError(
                f"{traced.model_name}: forward makes a constant ({key}) on the device of its inputs in a way that cannot be "
                "traced; make it with torch.tensor, or register it as a buffer"
            )
        traced.constants[key] = value.detach()
    return key


def _spell_tokens(
    graph: fx.Graph, tokens: dict[fx.Node, str], traced: Skeleton, inputs: list[fx.Node]
) -> dict[fx.Node, fx.Node]:
    """Say each helper input's size through the real inputs (`sample.size(2) // 4`); returns old size node -> new."""
    replaced: dict[fx.Node, fx.Node] = {}
    for token, name in tokens.items():
        node, index, factor = next(
            (node, i, int(dim.rpartition("*")[0]))
            for node, dims in zip(inputs, traced.dims or [])
            for i, dim in enumerate(dims)
            if dim is not None and dim.endswith(f"*{name}")
        )
        size = graph.call_function(torch.ops.aten.sym_size.int, (node, index))
        size.meta["val"] = node.meta["val"].shape[index]
        quotient = graph.call_function(operator.floordiv, (size, factor))
        quotient.meta["val"] = token.meta["val"].shape[0]
        for use in token.users:
            if use.target is not torch.ops.aten.sym_size.int:
                raise CaptureError(f"{traced.model_name}: {use} reads a helper input of the capture")
            replaced[use] = quotient
    return replaced


def relocate(gm: fx.GraphModule, device: torch.device) -> None:
    """Move a graph traced on `meta` to the device it will run on: every device argument and every `val`.

    What the model computes of constants on the CPU, to copy the result to its inputs' device, moves as well: a constant is a
    weight here and comes with its block, and a step that is recorded cannot wait for the host.
    """

    def move(value: Any) -> Any:
        return device if isinstance(value, torch.device) and value.type in _TRACED_ON else value

    for node in gm.graph.nodes:
        node.args = pytree.tree_map(move, node.args)
        node.kwargs = pytree.tree_map(move, node.kwargs)
        if device.type != "cpu" and _makes_its_own(node):
            node.kwargs = {**node.kwargs, "device": device}
        for leaf in pytree.tree_leaves(node.meta.get("val")):
            if isinstance(leaf, torch.Tensor) and leaf.device.type in _TRACED_ON:
                leaf.fake_device = device  # type: ignore[attr-defined]
    mode = fake_mode(gm)
    for node in gm.graph.nodes:
        if node.op == "call_function":
            # Some layouts depend on the device (attention on the CPU returns another stride order than on meta).
            val = infer(node.target, node.args, node.kwargs, mode)
            if "val" not in node.meta or spec(val) != spec(node.meta["val"]):  # decomposing drops some
                node.meta["val"] = val
    gm.recompile()


_TRACED_ON = ("meta", "cpu")


def _makes_its_own(node: fx.Node) -> bool:
    """Whether the operation makes a tensor of no other, on a device that it is not told: torch's default, the CPU."""
    if not isinstance(node.target, torch._ops.OpOverload) or node.kwargs.get("device") is not None:
        return False
    takes_device = any(argument.name == "device" for argument in node.target._schema.arguments)
    return takes_device and not any(isinstance(n.meta.get("val"), torch.Tensor) for n in node.all_input_nodes)
