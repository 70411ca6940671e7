"""aten.linear(x, w, b)  ->  squareq.int8_linear(x, qweight, scale, zero_point, b)"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import fx

from squareq_fx import ops
from squareq_fx.compute import Compute, Decisions, modes_of
from squareq_fx.edit import add_weight, call, drop_unused_weights, finish, replace
from squareq_fx.errors import PassError
from squareq_fx.inference import empty
from squareq_fx.ir import Level, clone, fake_mode, info, model_source, program, update_program, weight_inputs
from squareq_fx.slab.manifest import LayerEntry
from squareq_fx.slab.reader import Slab

__all__ = ["Quantize"]

_LINEAR = torch.ops.aten.linear.default


@dataclass(frozen=True)
class Quantize:
    """Every Linear whose weight is in the slab computes on the slab's INT8 rows.

    Args:
        slab: x [..., in] bf16, fp16 or fp32; qweight [out, in_padded] int8; scale, zero_point [out] fp32; bias [out] fp32.
        compute: what every layer multiplies, or layer name to that (layers without an entry: "w8a16"), or `Decisions`.
            "w8a16": the activations as they are with the widened weight. "w8a8": rows of the activations in int8 too; the
            node then ends in `"w8a8"`, and `activations` makes two of it.
        keep: layers that compute in 16 bits whatever `compute` says: suffixes of names ("proj_out") or regular expressions
            of a whole name. Their weights are the slab's INT8 rows all the same, for the slab has no others; a layer whose
            weight must stay 16 bits too is left out of the slab with `build_slab(exclude=...)`.

    Requires: a graph before outlining.   Preserves: signature, every shape and dtype.
    Changes: values, within half a step (scale / 2) a weight; with "w8a8" also half a step (the row's largest magnitude / 254)
    an activation.
    A layer called twice becomes two nodes. A layer the model never calls is named in the program's notes.

    Raises:
        PassError: the slab is of another model; a slab weight is read by anything but a Linear call; shapes differ; `compute`
            names a layer or a way that is none; a `keep` matches no layer of the slab.

    Source: LLM.int8() (arXiv 2208.07339), section 2.1: vector-wise symmetric weights, here without the outlier split.
    """

    slab: Slab
    compute: Compute | Mapping[str, Compute] | Decisions = "w8a16"
    keep: tuple[str, ...] = ()

    name = "quantize"
    requires_level = Level.CAPTURED
    changes_inputs = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "keep", (self.keep,) if isinstance(self.keep, str) else tuple(self.keep))
        modes_of(self.slab, self.compute, self.keep)

    def __call__(self, gm: fx.GraphModule) -> fx.GraphModule:
        record = program(gm)
        if record.level >= Level.OUTLINED:
            raise PassError("quantize works on a flat graph; put it before outline")
        if record.model_signature != self.slab.signature:
            raise PassError(
                f"{self.slab.path} was built from another model: its signature is {self.slab.signature}, that of "
                f"{record.model_class} is {record.model_signature}. Build a slab from this model with squareq_fx.build_slab."
            )
        gm = clone(gm)
        weights = weight_inputs(gm)
        modes = modes_of(self.slab, self.compute, self.keep)
        for key, layers in self._layers_by_weight(gm).items():
            if key in weights:
                self._rewrite(gm, weights[key], layers, modes)
        drop_unused_weights(gm)
        finish(gm)
        called = {info(n).layer for n in gm.graph.nodes if n.target is ops.int8_linear}
        never_called = [name for name in self.slab.layers if name not in called]
        notes = record.notes + tuple(f"slab layer {name} is never called by {record.model_class}" for name in never_called)
        if isinstance(self.compute, Decisions):
            notes += tuple(note for note in self.compute.notes if note not in notes)
            update_program(gm, decisions=self.compute)
        return update_program(gm, level=max(record.level, Level.QUANTIZED), notes=tuple(dict.fromkeys(notes)))

    def ensures(self, before: fx.GraphModule, after: fx.GraphModule) -> None:
        """Every call of a slab layer is one int8 node that computes as was decided, nothing else is, and no float weight of
        the slab is left.

        Raises:
            PassError: naming the layer.
        """
        by_weight = self._layers_by_weight(before)
        names = {key: " and ".join(e.canonical_name for e in entries) for key, entries in by_weight.items()}
        quantised = {e.qweight_key: names[key] for key, entries in by_weight.items() for e in entries}
        expected = _calls(before, _LINEAR, 1, names)
        already = _calls(before, ops.int8_linear, 1, quantised)
        found = _calls(after, ops.int8_linear, 1, quantised)
        for name in sorted({*expected, *already, *found}):
            want = expected.get(name, 0) + already.get(name, 0)
            if found.get(name, 0) != want:
                raise PassError(f"layer {name} is called {want} times, but has {found.get(name, 0)} int8 nodes")
        total = sum(1 for n in after.graph.nodes if n.target is ops.int8_linear)
        if total != sum(found.values()):
            raise PassError(f"{total - sum(found.values())} int8 nodes belong to no layer of the slab")
        modes = modes_of(self.slab, self.compute, self.keep)
        decided = {info(n).layer for n in before.graph.nodes if n.target is ops.int8_linear}
        for node in after.graph.nodes:
            name = str(info(node).layer)
            if node.target is ops.int8_linear and name in modes and name not in decided and _mode(node) != modes[name]:
                raise PassError(f"layer {name} computes {_mode(node)}, not {modes[name]}")
        floats = [key for key in weight_inputs(after) if key.endswith(".weight")]
        left = [key for key in floats if key.removesuffix(".weight") in self.slab.layers]
        if left:
            raise PassError(f"the float weight {left[0]} is still an input")

    def _layers_by_weight(self, gm: fx.GraphModule) -> dict[str, list[LayerEntry]]:
        """The slab's layers by the key of their weight in the graph; several if they share one tensor."""
        tied = program(gm).tied
        found: dict[str, list[LayerEntry]] = {}
        for name, layer in self.slab.layers.items():
            found.setdefault(tied.get(f"{name}.weight", f"{name}.weight"), []).append(layer)
        return found

    def _rewrite(
        self, gm: fx.GraphModule, weight: fx.Node, layers: list[LayerEntry], modes: Mapping[str, Compute]
    ) -> None:
        shape, key = tuple(weight.meta["val"].shape), info(weight).key
        for layer in layers:
            if shape != tuple(layer.orig_shape):
                raise PassError(
                    f"layer {layer.canonical_name}: the model's weight is {shape}, the slab's {tuple(layer.orig_shape)}"
                )
        own = next((e.canonical_name for e in layers if key == f"{e.canonical_name}.weight"), None)
        calls = []
        for user in weight.users:
            if user.target is _LINEAR and user.args[1] is weight and weight not in (user.args[0], *user.args[2:]):
                calls.append(user)
            elif own is not None:  # else it goes by another name: an embedding's, say, that the layer is tied to
                raise PassError(
                    f"the weight of slab layer {own} is read by {user.name} ({user.target}), which is not a Linear call; "
                    f"build the slab with exclude=[{own!r}]\n  model source: {model_source(user)}"
                )
        for layer in layers:
            mine = [user for user in calls if _called_layer(user, layers) is layer]
            if mine:
                parts = self._inputs(gm, weight, layer, _is_own_bias(mine, layer))
                for user in mine:
                    self._rewrite_call(user, parts, layer, modes[layer.canonical_name])

    def _inputs(
        self, gm: fx.GraphModule, weight: fx.Node, layer: LayerEntry, with_bias: bool
    ) -> dict[str, fx.Node]:
        mode, device = fake_mode(gm), program(gm).device
        out, padded = layer.packed_shape
        shapes = {
            layer.qweight_key: ((out, padded), torch.int8),
            layer.scale_key: ((out,), torch.float32),
            layer.zero_point_key: ((out,), torch.float32),
        }
        if layer.bias_key is not None:
            shapes[layer.bias_key] = ((out,), torch.float32)
        return {
            key: add_weight(weight, key, empty(mode, shape, dtype, device), made_by=self.name, layer=layer.canonical_name)
            for key, (shape, dtype) in shapes.items()
            if key != layer.bias_key or with_bias
        }

    def _rewrite_call(self, node: fx.Node, parts: dict[str, fx.Node], layer: LayerEntry, mode: Compute) -> None:
        x, bias = node.args[0], node.args[2] if len(node.args) > 2 else None
        own = parts.get(str(layer.bias_key)) if _reads_bias(node, layer) else None
        quantised = (parts[layer.qweight_key], parts[layer.scale_key], parts[layer.zero_point_key])
        decided = () if mode == "w8a16" else (mode,)  # the default is not spelled out
        how = {"like": node, "made_by": self.name, "layer": layer.canonical_name}
        with node.graph.inserting_before(node):
            new = call(
                node.graph,
                ops.int8_linear,
                (x, *quantised, own, *decided),
                name=layer.canonical_name.replace(".", "_"),
                **how,  # type: ignore[arg-type]
            )
            if bias is not None and own is None:  # F.linear with a bias that is not the layer's
                new = call(node.graph, torch.ops.aten.add.Tensor, (new, bias), **how)  # type: ignore[arg-type]
        replace(node, new)


def _called_layer(node: fx.Node, layers: list[LayerEntry]) -> LayerEntry:
    """Which of the layers that share a weight this call is of: the module it was traced in, else the first."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    path = stack[-1][0].partition("@")[0] if stack else ""
    return next((layer for layer in layers if layer.canonical_name == path), layers[0])


def _is_own_bias(calls: list[fx.Node], layer: LayerEntry) -> bool:
    """The layer's calls read its bias, and nothing else does; otherwise the float tensor has to stay."""
    biases = {call.args[2] for call in calls if _reads_bias(call, layer)}
    return bool(biases) and all(user in calls for bias in biases for user in bias.users)  # type: ignore[union-attr]


def _reads_bias(node: fx.Node, layer: LayerEntry) -> bool:
    bias = node.args[2] if len(node.args) > 2 else None
    return isinstance(bias, fx.Node) and info(bias).key == layer.bias_key


def _mode(node: fx.Node) -> object:
    return node.args[5] if len(node.args) > 5 else "w8a16"


def _calls(gm: fx.GraphModule, target: object, index: int, names: dict[str, str]) -> dict[str, int]:
    """How often each layer is called: nodes of `target` whose argument `index` is a weight input named in `names`."""
    count: dict[str, int] = {}
    for node in gm.graph.nodes:
        if node.target is target and isinstance(node.args[index], fx.Node):
            name = names.get(str(info(node.args[index]).key))
            if name is not None:
                count[name] = count.get(name, 0) + 1
    return count
