"""outputs  ->  outputs, and the gradient of a loss by every adapter, given the loss's gradient by the outputs"""

from __future__ import annotations

import contextlib
import operator
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import fx

from squareq_fx import ops
from squareq_fx.edit import add_function, call, call_function, drop_unused_functions, enclosed, finish, results
from squareq_fx.errors import PassError
from squareq_fx.gradients.activity import active_values, output_nodes
from squareq_fx.gradients.pullback import Pullback, recomputing, saving
from squareq_fx.gradients.vjp import trace_vjp
from squareq_fx.ir import (
    Level,
    adapter_inputs,
    clone,
    functions,
    info,
    model_source,
    operation_name,
    program,
    set_info,
    update_program,
)
from squareq_fx.liveness import shared_storage
from squareq_fx.specs import spec

__all__ = ["Differentiate", "Save"]

Save = Literal["recompute", "save", "offload"]
NAME = "differentiate"


@dataclass(frozen=True)
class Differentiate:
    """The backward of the whole graph, from one vector-Jacobian product for each unique function and pattern of activity.

        sample = self.epilogue(...)
        d_sample = squareq.cotangent(sample, 0)                 # the loss lies here, between forward and backward
        d_x, d_temb = self.epilogue_vjp(..., d_sample)

    Args:
        save: what a call keeps for its backward: "recompute" its inputs only, "save" what the backward reads, "offload" the
            same in pinned host memory. One for all, or by regular expression of a whole segment name (`info(call).key`); the
            first that matches counts, the rest recompute.
        inputs: paths of inputs of the model that get a gradient too.

    Requires: an outlined graph with adapters, or `inputs`.   Preserves: signature, the model's outputs: bit for bit
    where blocks recompute; where they save, to the rounding of another order of the same operations.
    Gradients follow the outputs, in the order of `program(gm).gradients`. Nothing is computed that no gradient needs: not by
    frozen inputs, nor through blocks before the first adapter.

    Raises:
        PassError: nothing to differentiate by, an input without a floating point type, an unknown mode, an operation that would
            cut a gradient.

    Source: reverse mode as in Decomposing reverse-mode automatic differentiation (arXiv 2105.09469); recomputation as in
    Training Deep Nets with Sublinear Memory Cost (arXiv 1604.06174).
    """

    save: Save | Mapping[str, Save] = "recompute"
    inputs: tuple[str, ...] = ()

    name = NAME
    requires_level = Level.OUTLINED

    def __post_init__(self) -> None:
        modes = (self.save,) if isinstance(self.save, str) else tuple(self.save.values())
        for mode in modes:
            if mode not in get_args(Save):
                raise PassError(f"differentiate: save={mode!r} is none of {', '.join(get_args(Save))}")

    def __call__(self, gm: fx.GraphModule) -> fx.GraphModule:
        gm = clone(gm)
        if program(gm).gradients:
            return gm
        if program(gm).level >= Level.STREAMED:
            raise PassError("differentiate works on an outlined graph that is not streamed yet; put it before stream")
        return _Backward(gm, self).build()

    def mode(self, segment: str) -> Save:
        """What a call of this segment keeps."""
        if isinstance(self.save, str):
            return self.save
        return next((mode for pattern, mode in self.save.items() if re.fullmatch(pattern, segment)), "recompute")


class _Backward:
    """The walk from the outputs back, on a graph of its own."""

    def __init__(self, gm: fx.GraphModule, options: Differentiate) -> None:
        self.gm, self.options = gm, options
        self.seeds = self._seeds()
        self.active = active_values(gm, self.seeds.values())
        self.adjoint: dict[fx.Node, fx.Node] = {}
        self.pullbacks: dict[tuple[Any, ...], _Named] = {}
        self.roots: dict[fx.Node, frozenset[fx.Node]] = {}
        self.copies: dict[fx.Node, fx.Node] = {}
        self.last: fx.Node | None = None  # the call before, in the backward's order

    def build(self) -> fx.GraphModule:
        self._enclose()
        self.roots = shared_storage(self.gm)
        output = next(n for n in self.gm.graph.nodes if n.op == "output")
        calls = [n for n in self.gm.graph.nodes if n.op == "call_module" and n in self.active]
        with self.gm.graph.inserting_before(output):
            self._seed()
            for node in reversed(calls):
                self._differentiate(node)
        found = {key: self.adjoint[node] for key, node in self.seeds.items() if node in self.adjoint}
        notes = tuple(
            f"{key} has no influence on the output and gets no gradient" for kind, key in self.seeds if (kind, key) not in found
        )
        output.args = ((*output_nodes(self.gm), *found.values()),)
        drop_unused_functions(self.gm)
        record = program(self.gm)
        return update_program(
            finish(self.gm), level=Level.DIFFERENTIATED, gradients=tuple(found), notes=(*record.notes, *notes)
        )

    def _seeds(self) -> dict[tuple[str, str], fx.Node]:
        """What to differentiate by, in order: adapters, then the inputs asked for."""
        seeds = {("adapter", key): node for key, node in adapter_inputs(self.gm).items()}
        given = {str(info(n).key): n for n in self.gm.graph.nodes if n.op == "placeholder" and info(n).kind == "input"}
        for path in self.options.inputs:
            if path not in given:
                raise PassError(f"differentiate: the model has no tensor input {path!r}; it has {', '.join(given)}")
            if not given[path].meta["val"].is_floating_point():
                raise PassError(f"differentiate: input {path!r} is {given[path].meta['val'].dtype}, which has no gradient")
            seeds["input", path] = given[path]
        if not seeds:
            raise PassError("differentiate: there is nothing to differentiate by; run adapt first, or name inputs")
        return seeds

    def _enclose(self) -> None:
        """An active operation that stands between the calls becomes a function of its own: only calls are differentiated."""
        for node in list(self.gm.graph.nodes):
            if node.op != "call_function" or node not in self.active or node.target is operator.getitem:
                continue
            function, arguments = enclosed(node)
            name = add_function(self.gm, operation_name(node.target), function)
            with self.gm.graph.inserting_before(node):
                call_node, _ = call_function(self.gm, name, arguments, like=node, made_by=NAME, name=node.name)
            set_info(call_node, arguments=info(node).arguments)
            self.active.add(call_node)
            node.replace_all_uses_with(call_node)
            self.gm.graph.erase_node(node)

    def _seed(self) -> None:
        chosen = {i: node for i, node in enumerate(output_nodes(self.gm)) if node in self.active}
        if not chosen:
            raise PassError("differentiate: no output of the model depends on an adapter, so there is no gradient to find")
        for i, node in chosen.items():
            cotangent = call(self.gm.graph, ops.cotangent, (node, i), like=node, made_by=NAME, name=f"d_{node.name}")
            self._accumulate(node, cotangent)

    def _accumulate(self, node: fx.Node, gradient: fx.Node) -> None:
        """The sum of the gradients that reach a value from its uses."""
        if node in self.adjoint:
            both = (self.adjoint[node], gradient)
            add, name = torch.ops.aten.add.Tensor, f"d_{node.name}"
            gradient = call(self.gm.graph, add, both, like=gradient, made_by=NAME, name=name)
        self.adjoint[node] = gradient

    def _differentiate(self, node: fx.Node) -> None:
        values = results(node)
        reached = tuple(i for i, value in values.items() if value in self.adjoint)
        if not reached:
            return
        mode = self.options.mode(str(info(node).key))
        arguments = list(node.args)
        wrt = tuple(i for i, a in enumerate(arguments) if a in self.active)
        pullback = self._pullback(str(node.target), wrt, reached, mode != "recompute")
        cotangents = [self.adjoint[values[i]] for i in reached]
        saved = self._save(node, pullback, mode) if pullback.forward is not None else []
        inputs = [*(self._lasting(arguments[i]) for i in pullback.parts.inputs), *saved, *cotangents]
        of = [arguments[wrt[i]] for i in pullback.parts.gradients]
        names = [f"d_{a.name}" for a in of]  # type: ignore[union-attr]
        vjp, gradients = call_function(
            self.gm, pullback.backward, inputs, like=node, made_by=NAME, name=f"{node.name}_vjp", results=names
        )
        self.last = set_info(vjp, key=info(node).key)
        for argument, gradient in zip(of, gradients):
            self._accumulate(argument, gradient)  # type: ignore[arg-type]

    def _lasting(self, argument: Any) -> Any:
        """A value for the backward to read. A view that a block hands on of its weights is gone by then, so it gets a copy."""
        roots = self.roots.get(argument, frozenset()) - {argument}
        if not any(root.op == "placeholder" and info(root).kind == "weight" for root in roots):
            return argument
        if argument not in self.copies:
            with self.gm.graph.inserting_after(argument):
                clone_, name = torch.ops.aten.clone.default, f"{argument.name}_copy"
                self.copies[argument] = call(self.gm.graph, clone_, (argument,), like=argument, made_by=NAME, name=name)
            if spec(self.copies[argument].meta["val"]) != spec(argument.meta["val"]):
                raise PassError(
                    f"{argument.name} is a view of weights with strides no copy has, and the backward needs it after these are "
                    f"evicted; call .contiguous() on it in the model.\n  model source: {model_source(argument)}"
                )
        return self.copies[argument]

    def _pullback(self, name: str, wrt: tuple[int, ...], reached: tuple[int, ...], save: bool) -> _Named:
        """Made once for each function, pattern of activity and mode."""
        key = (name, wrt, reached, save)
        if key not in self.pullbacks:
            traced = trace_vjp(functions(self.gm)[name], wrt, reached, NAME)
            parts = saving(traced) if save else recomputing(traced)
            backward = add_function(self.gm, f"{name}_vjp", parts.backward)
            forward = add_function(self.gm, f"{name}_saving", parts.forward) if parts.forward is not None else None
            self.pullbacks[key] = _Named(parts, backward, forward)
        return self.pullbacks[key]

    def _save(self, node: fx.Node, pullback: _Named, mode: Save) -> list[fx.Node]:
        """Let the forward call the function that also returns what the backward reads; gives that."""
        values = results(node)
        count = len(output_nodes(functions(self.gm)[str(pullback.forward)])) - pullback.parts.saved
        names = [values[i].name if i in values else "unused" for i in range(count)]
        names += [f"{node.name}_saved_{i}" for i in range(pullback.parts.saved)]
        with self.gm.graph.inserting_before(node):
            new, found = call_function(
                self.gm, str(pullback.forward), list(node.args), like=node, made_by=NAME, name=node.name, results=names
            )
        set_info(new, key=info(node).key)
        for i, value in values.items():
            set_info(found[i], arguments=info(value).arguments)
            value.replace_all_uses_with(found[i])
            if value in self.adjoint:
                self.adjoint[found[i]] = self.adjoint.pop(value)
        for value in dict.fromkeys((*values.values(), node)):
            if not value.users:
                self.gm.graph.erase_node(value)
        return self._offloaded(found[count:]) if mode == "offload" else found[count:]

    def _offloaded(self, saved: list[fx.Node]) -> list[fx.Node]:
        """To host memory where it is made, and back while the call before the one that reads it runs."""
        device, back = program(self.gm).device, []
        for value in saved:
            with self.gm.graph.inserting_after(value):
                host = call(self.gm.graph, ops.offload, (value,), like=value, made_by=NAME, name=f"{value.name}_host")
            with self.gm.graph.inserting_before(self.last) if self.last is not None else contextlib.nullcontext():
                fetch = call(self.gm.graph, ops.fetch, (host, device), like=value, made_by=NAME, name=f"{value.name}_fetch")
            back.append(call(self.gm.graph, ops.arrived, (fetch,), like=value, made_by=NAME, name=f"{value.name}_back"))
        return back


@dataclass(frozen=True)
class _Named:
    """A pullback, and what its functions are called in the graph."""

    parts: Pullback
    backward: str
    forward: str | None
