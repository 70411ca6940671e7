"""One recording of a graph for inputs of one kind: made piece by piece between the nodes that move memory, and played so."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from squareq_fx.errors import RuntimeStateError, SquareQError
from squareq_fx.recording.cuda_graphs import Graph, Recorder, copy_into, memory_like
from squareq_fx.recording.pieces import Plan, Step, arguments, evaluate

__all__ = ["Recording"]


@dataclass
class _Piece:
    """A recorded step.

    Attributes:
        fixed: values that it is the first to read and that must lie where they did, with their addresses.
        staged: values that it is the first to read and that are copied to `buffers`.
        results: what it gives; the memory is the pool's.
    """

    graph: Graph
    fixed: list[tuple[fx.Node, int]]
    staged: list[fx.Node]
    buffers: list[torch.Tensor]
    results: dict[fx.Node, Any]


@dataclass
class Recording:
    """All pieces of a graph for inputs of one kind.

    Attributes:
        moved: what no longer lay where it did in the last replay, which therefore ended without recorded kernels.
    """

    gm: fx.GraphModule
    plan: Plan
    recorder: Recorder
    pieces: dict[int, _Piece] = field(default_factory=dict)
    constants: dict[fx.Node, Any] = field(default_factory=dict)
    moved: str | None = None

    def record(self, inputs: Sequence[Any]) -> Any:
        """Records step by step, and does the work of each before the next is recorded: loads go between."""
        self.recorder.prepare()
        values = self._given(inputs)
        in_place: dict[fx.Node, Any] = {}  # what pieces read, where they read it; what nothing refers to may be overwritten
        for index, step in enumerate(self.plan.steps):
            if step.kind == "piece":
                self.pieces[index] = self._record_piece(step, values, in_place)
                self._play(step, self.pieces[index], values)
            else:
                at_work = 0
                if step.kind == "move":
                    at_work = 1
                    self._move(step.nodes[0], values)
                evaluate(self.gm, step.nodes[at_work:], values)
                self.constants.update((node, values[node]) for node in step.nodes[at_work:])
            for node in step.dead:
                in_place.pop(node, None)
            self._forget(step, values)
        return map_arg(self.plan.output, values.__getitem__)

    def replay(self, inputs: Sequence[Any]) -> Any:
        values = self._given(inputs)
        values.update(self.constants)
        for index, step in enumerate(self.plan.steps):
            if step.kind == "move":
                self._move(step.nodes[0], values)
            elif step.kind == "piece":
                piece = self.pieces[index]
                for node, address in piece.fixed:
                    if values[node].data_ptr() != address:
                        self.moved = f"{node.args[0]!r}" if node.op == "call_function" else str(node.target)
                        return self._finish(index, values)
                self._play(step, piece, values)
            self._forget(step, values)
        return map_arg(self.plan.output, values.__getitem__)

    def release(self) -> None:
        pieces, self.pieces = self.pieces, {}
        if pieces:
            self.recorder.release([piece.graph for piece in pieces.values()])

    def _given(self, inputs: Sequence[Any]) -> dict[fx.Node, Any]:
        values = dict(zip(self.plan.inputs, inputs))
        values.update((node, operator.attrgetter(str(node.target))(self.gm)) for node in self.plan.attributes)
        return values

    def _record_piece(self, step: Step, values: dict[fx.Node, Any], in_place: dict[fx.Node, Any]) -> _Piece:
        fixed, staged = [], []
        for node in step.reads:
            if node in in_place:
                continue
            value = values[node]
            if not isinstance(value, torch.Tensor):
                in_place[node] = value
            elif value.device != self.recorder.device:
                raise RuntimeStateError(
                    f"{node.name}, which {step.name} reads, is on {value.device}; only what is on {self.recorder.device} "
                    'can be recorded. Compile with backend="inductor".'
                )
            elif node in self.plan.fixed:
                in_place[node] = value
                fixed.append((node, value.data_ptr()))
            else:
                staged.append(node)
        here = [node for node in step.reads if node in in_place]

        def run(inputs: Sequence[Any], buffers: Sequence[torch.Tensor]) -> list[Any]:
            found = dict(zip([*here, *staged], [*inputs, *buffers]))
            evaluate(self.gm, step.nodes, found)
            return [found[node] for node in step.gives]

        try:
            sources = [values[node] for node in staged]
            buffers, results, graph = self.recorder.record([in_place[node] for node in here], sources, run)
        except (SquareQError, torch.OutOfMemoryError):
            raise
        except RuntimeError as error:
            raise RuntimeStateError(
                f"{step.name} cannot be recorded as a CUDA graph, though it ran: it waits for the device, or reads memory of "
                f'the host. Compile with backend="inductor". The device said: {error}'
            ) from error
        in_place.update(zip(staged, buffers))
        in_place.update(zip(step.gives, results))
        alias = self.recorder.alias
        results = pytree.tree_map_only(torch.Tensor, alias, list(results))
        return _Piece(graph, fixed, staged, [alias(b) for b in buffers], dict(zip(step.gives, results)))

    def _play(self, step: Step, piece: _Piece, values: dict[fx.Node, Any]) -> None:
        copy_into(piece.buffers, [values[node] for node in piece.staged])
        piece.graph.replay()
        values.update(piece.results)
        self._keep(step.returned, values)

    def _keep(self, nodes: Sequence[fx.Node], values: dict[fx.Node, Any]) -> None:
        """Values of the pool become the caller's, at once: the pool can use their memory for later pieces."""
        if nodes:
            leaves, tree = pytree.tree_flatten([values[node] for node in nodes])
            tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
            copies = [memory_like(tensor) for tensor in tensors]
            copy_into(copies, tensors)
            kept = iter(copies)
            leaves = [next(kept) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
            values.update(zip(nodes, pytree.tree_unflatten(leaves, tree)))

    def _move(self, node: fx.Node, values: dict[fx.Node, Any]) -> None:
        """The copy to the host goes on beside later pieces, which may use a result's memory: it reads a copy."""
        owned = {n: values[n] for n in node.all_input_nodes}
        self._keep([n for n in owned if n in self.plan.computed and n not in self.plan.returned], owned)
        args, kwargs = arguments(node, owned)
        values[node] = node.target(*args, **kwargs)  # type: ignore[operator]

    def _finish(self, index: int, values: dict[fx.Node, Any]) -> Any:
        """The steps from `index` on without recorded kernels; what earlier ones left in the pool still holds."""
        for step in self.plan.steps[index:]:
            if step.kind == "move":
                self._move(step.nodes[0], values)
            else:
                evaluate(self.gm, step.nodes, values)
                self._keep(step.returned, values)  # it may be a view of what lies in the pool
            self._forget(step, values)
        return map_arg(self.plan.output, values.__getitem__)

    @staticmethod
    def _forget(step: Step, values: dict[fx.Node, Any]) -> None:
        for node in step.dead:
            values.pop(node, None)
