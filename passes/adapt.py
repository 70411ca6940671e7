"""y = linear(x)  ->  y + (x @ A^T) @ B^T"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from squareq_fx import ops
from squareq_fx.edit import add_input, call, finish
from squareq_fx.errors import PassError
from squareq_fx.inference import empty, new_size
from squareq_fx.ir import Level, adapter_inputs, clone, fake_mode, info, program, update_program
from squareq_fx.lora import Lora

__all__ = ["Adapt"]

_LINEAR = torch.ops.aten.linear.default
_SIDES = ("lora_A", "lora_B")


@dataclass(frozen=True)
class Adapt:
    """Low-rank branches beside Linear layers; their matrices are explicit inputs.

    Args:
        lora: which layers, and of what rank.

    Requires: a flat graph, before or after `quantize`.   Preserves: signature, shapes, dtypes; values while B is zero.
    A `<layer>.lora_A.weight` [r, in] and B `<layer>.lora_B.weight` [out, r] come in the type of x, B with alpha / r in it: what
    is trained are float32 masters that `emit` keeps. r is a size of its own, one for each rank in `lora`, so that adapters of
    other ranks, or several side by side, run on the same graph. A layer called twice has one pair and two branches.

    Raises:
        PassError: the targets match no layer, or a layer is called with inputs of two types.

    Source: LoRA (arXiv 2106.09685), section 4.1.
    """

    lora: Lora

    name = "adapt"
    requires_level = Level.CAPTURED
    changes_inputs = True

    def __call__(self, gm: fx.GraphModule) -> fx.GraphModule:
        if program(gm).level >= Level.OUTLINED:
            raise PassError("adapt works on a flat graph; put it before outline")
        gm = clone(gm)
        if adapter_inputs(gm):
            return gm
        calls = _linear_calls(gm)
        layers = self.lora.layers(calls)
        sizes = {rank: new_size(fake_mode(gm), f"rank_{rank}") for rank in dict.fromkeys(e.rank for e in layers.values())}
        for name, entry in layers.items():
            pair = self._inputs(gm, name, calls[name], sizes[entry.rank])
            for node in calls[name]:
                self._branch(node, name, *pair)
        return update_program(finish(gm), lora=self.lora)

    def ensures(self, before: fx.GraphModule, after: fx.GraphModule) -> None:
        """Each call of each target has one branch, and nothing else reads an adapter.

        Raises:
            PassError: naming the layer.
        """
        pairs = adapter_inputs(after)
        calls = _linear_calls(after)
        for name in self.lora.layers(_linear_calls(before)):
            for side in _SIDES:
                node = pairs.get(f"{name}.{side}.weight")
                found = len(node.users) if node is not None else 0
                if found != len(calls[name]):
                    raise PassError(f"layer {name} is called {len(calls[name])} times, its {side} {found} times")

    def _inputs(self, gm: fx.GraphModule, layer: str, calls: list[fx.Node], rank: Any) -> tuple[fx.Node, fx.Node]:
        xs = [node.args[0].meta["val"] for node in calls]  # type: ignore[union-attr]
        if len({x.dtype for x in xs}) > 1:
            types = sorted({str(x.dtype) for x in xs})
            raise PassError(f"layer {layer} is called with {' and '.join(types)}; its adapter can have one type only")
        shapes = {"lora_A": (rank, xs[0].shape[-1]), "lora_B": (calls[0].meta["val"].shape[-1], rank)}
        before = next(n for n in gm.graph.nodes if n.op != "placeholder")
        return tuple(  # type: ignore[return-value]
            add_input(
                before,
                f"{layer}.{side}.weight",
                empty(fake_mode(gm), shapes[side], xs[0].dtype, program(gm).device),
                kind="adapter",
                made_by=self.name,
                layer=layer,
            )
            for side in _SIDES
        )

    def _branch(self, node: fx.Node, layer: str, down: fx.Node, up: fx.Node) -> None:
        how: dict[str, Any] = {"like": node, "made_by": self.name}
        base = layer.replace(".", "_")
        users = list(node.users)
        with node.graph.inserting_before(node.next):
            low = call(
                node.graph, _LINEAR, (node.args[0], down), name=f"{base}_lora_down", layer=f"{layer}.lora_down", **how
            )
            high = call(node.graph, _LINEAR, (low, up), name=f"{base}_lora_up", layer=f"{layer}.lora_up", **how)
            total = call(
                node.graph, torch.ops.aten.add.Tensor, (node, high), name=f"{base}_lora", layer=f"{layer}.lora", **how
            )
        for user in users:
            user.replace_input_with(node, total)


def _linear_calls(gm: fx.GraphModule) -> dict[str, list[fx.Node]]:
    """The calls of every Linear layer, quantised or not, by the layer's path in the model."""
    found: dict[str, list[fx.Node]] = {}
    for node in gm.graph.nodes:
        if node.target is ops.int8_linear:
            found.setdefault(str(info(node).layer), []).append(node)
        elif node.target is _LINEAR and isinstance(node.args[1], fx.Node):
            weight = info(node.args[1])
            if weight.kind == "weight" and str(weight.key).endswith(".weight"):
                found.setdefault(str(weight.key).removesuffix(".weight"), []).append(node)
    return found


