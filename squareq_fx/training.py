"""Forward and backward of a compiled module as one autograd function: streamed in both directions, nothing of it kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from squareq_fx.adapters.packing import Branch, unpack_gradients
from squareq_fx.errors import RuntimeStateError
from squareq_fx.gradients.activity import output_nodes
from squareq_fx.gradients.halves import Halves, halves
from squareq_fx.ir import info, program
from squareq_fx.lowering.backends import Lowering
from squareq_fx.lowering.lowered import Lowered

__all__ = ["Training"]

Run = Callable[[Callable[..., Any], Sequence[Any]], Sequence[Any]]


class Training:
    """Runs the two halves of a graph with a backward.

    Args:
        gm: the scheduled graph.
        run: runs a half on its inputs, as a step of the runtime.
        weights: values of the graph's resident weights, by key.
        lowering: makes what runs in place of the halves.
    """

    def __init__(
        self, gm: fx.GraphModule, run: Run, weights: Callable[[str], torch.Tensor], lowering: Lowering | None = None
    ) -> None:
        self.whole = gm
        self.halves: Halves = halves(gm)
        make = lowering or Lowering()
        self._forward, self._backward = (Lowered(half, make=make) for half in (self.halves.forward, self.halves.backward))
        self.gradients = program(gm).gradients
        self._run = run
        self._weights = weights
        placeholders = [info(n) for n in gm.graph.nodes if n.op == "placeholder"]
        self._order = [(record.kind, str(record.key)) for record in placeholders]
        self.inputs = [key for kind, key in self._order if kind == "input"]
        self.adapters = [key for kind, key in self._order if kind == "adapter"]
        returned = output_nodes(self.halves.forward)
        self.output_values = [n.meta["val"] for n in returned[: len(returned) - len(self.halves.saved)]]
        taken = [n.meta["val"] for n in self.halves.backward.graph.nodes if n.op == "placeholder"]
        self._cotangent_types = [val.dtype for val in taken[-len(self.halves.outputs) :]]

    @property
    def lowered(self) -> tuple[Lowered, Lowered]:
        """What runs the halves."""
        return self._forward, self._backward

    @property
    def differentiable_inputs(self) -> tuple[str, ...]:
        """Paths of the inputs that can get a gradient."""
        return tuple(key for kind, key in self.gradients if kind == "input")

    def __call__(
        self, inputs: Sequence[torch.Tensor], branches: Sequence[Branch], packed: Sequence[torch.Tensor]
    ) -> tuple[torch.Tensor, ...]:
        """The model's outputs, connected to the masters in `branches` and to the inputs that require grad."""
        masters = [tensor for branch in branches for part in branch.parts for tensor in (part.down, part.up)]
        step = _Step(self, branches, packed, len(inputs))
        return _Function.apply(step, *inputs, *masters)

    def forward(self, inputs: Sequence[torch.Tensor], packed: Sequence[torch.Tensor]) -> tuple[list[Any], list[Any]]:
        """The model's outputs and what the backward wants."""
        results = list(self._run(self._forward, self.arguments(inputs, packed)))
        return results[: len(self.output_values)], results[len(self.output_values) :]

    def backward(
        self, inputs: Sequence[torch.Tensor], packed: Sequence[torch.Tensor], saved: Sequence[Any], cotangents: Sequence[Any]
    ) -> dict[tuple[str, str], torch.Tensor]:
        """One gradient for each entry of `gradients`."""
        given = [
            cotangents[i].to(dtype).contiguous() for i, dtype in zip(self.halves.outputs, self._cotangent_types)
        ]
        found = self._run(self._backward, [*self.arguments(inputs, packed), *saved, *given])
        return dict(zip(self.gradients, found))

    def arguments(self, inputs: Sequence[torch.Tensor], packed: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The whole graph's inputs, in order: the call's tensors, resident weights, adapters."""
        sources = {"input": iter(inputs), "adapter": iter(packed)}
        return [next(sources[kind]) if kind in sources else self._weights(key) for kind, key in self._order]


@dataclass(frozen=True)
class _Step:
    """One call: everything but the tensors autograd looks at."""

    training: Training
    branches: Sequence[Branch]
    packed: Sequence[torch.Tensor]
    inputs: int


class _Function(torch.autograd.Function):
    """To autograd the whole model is one operation. It saves the inputs, the adapters and the activations that cross."""

    @staticmethod
    def forward(ctx: Any, step: _Step, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        inputs = [t.detach() for t in tensors[: step.inputs]]
        outputs, saved = step.training.forward(inputs, step.packed)
        ctx.step = step
        ctx.sizes = [None if isinstance(value, torch.Tensor) else value for value in saved]
        ctx.save_for_backward(*tensors[: step.inputs], *step.packed, *(v for v in saved if isinstance(v, torch.Tensor)))
        ctx.mark_non_differentiable(*(o for i, o in enumerate(outputs) if i not in step.training.halves.outputs))
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *cotangents: torch.Tensor) -> tuple[Any, ...]:
        if torch.is_grad_enabled():
            raise RuntimeStateError(
                "the backward of a compiled module has no derivative of its own; leave create_graph out of backward() or grad()"
            )
        step: _Step = ctx.step
        tensors = iter(ctx.saved_tensors)
        inputs = [next(tensors).detach() for _ in range(step.inputs)]
        packed = [next(tensors) for _ in step.packed]
        saved = [next(tensors) if size is None else size for size in ctx.sizes]
        found = step.training.backward(inputs, packed, saved, cotangents)
        by_input = [found.get(("input", path)) for path in step.training.inputs]
        by_matrix = [found.get(("adapter", key)) for key in step.training.adapters]
        pairs = unpack_gradients(step.branches, by_matrix)
        return (None, *by_input, *(gradient for pair in pairs for gradient in pair))
