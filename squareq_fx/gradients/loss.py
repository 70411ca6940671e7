"""A loss function as a graph, with its own gradient, put between the forward and the backward of a model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from squareq_fx import ops
from squareq_fx.edit import add_function, add_input, call_function, finish
from squareq_fx.errors import BindingError
from squareq_fx.gradients.activity import output_nodes
from squareq_fx.gradients.vjp import fresh, gradients_of, tracing
from squareq_fx.inference import mode_of
from squareq_fx.ir import clone, program, update_program
from squareq_fx.verify import check_residency

__all__ = ["TracedLoss", "matched", "trace_loss", "with_loss"]


@dataclass(frozen=True)
class TracedLoss:
    """
    Attributes:
        function: takes the model's outputs and the loss's tensor arguments; returns the loss, the auxiliary tensors, and the
            gradients of the loss by the outputs asked for.
        aux: the pytree of the auxiliary values; None without.
    """

    function: fx.GraphModule
    aux: Any


def matched(leaves: Sequence[Any], outputs: Sequence[tuple[torch.Tensor, Sequence[int]]]) -> list[Any]:
    """The types of a loss's arguments: a tensor's size is that of an output where the two agree now, else the number it is.

    Args:
        leaves: the arguments; what is no tensor stays as it is.
        outputs: the outputs' types, whose sizes may be symbols, and their sizes in this call.
    """
    return [_matched(leaf, outputs) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]


def _matched(leaf: torch.Tensor, outputs: Sequence[tuple[torch.Tensor, Sequence[int]]]) -> torch.Tensor:
    mode = mode_of(outputs[0][0])
    best = max(outputs, key=lambda output: sum(a == b for a, b in zip(leaf.shape, output[1])))
    sizes = [symbol if size == now else size for size, symbol, now in zip(leaf.shape, best[0].shape, best[1])]
    sizes += leaf.shape[len(sizes) :]
    with mode, torch.no_grad():
        return torch.empty(sizes, dtype=leaf.dtype, device=leaf.device)


def trace_loss(
    loss_fn: Callable[[Sequence[torch.Tensor], Sequence[Any]], Any],
    outputs: Sequence[torch.Tensor],
    wanted: Sequence[int],
    arguments: Sequence[Any],
    *,
    has_aux: bool,
) -> TracedLoss:
    """Trace a loss and its gradients by some of the model's outputs.

    Args:
        loss_fn: from the model's outputs and the arguments to a scalar, or to (scalar, aux).
        outputs: the outputs' types. wanted: positions of those a gradient is needed of.
        arguments: types of the tensors, everything else itself.

    Raises:
        BindingError: the loss is no scalar of a floating point type, or does not depend on the outputs.
        PassError: torch cannot differentiate it.
    """
    mode = mode_of(outputs[0])
    given = [a for a in arguments if isinstance(a, torch.Tensor)]
    tree: list[Any] = [None]

    def joint(*flat: torch.Tensor) -> list[torch.Tensor]:
        values, rest = list(flat[: len(outputs)]), iter(flat[len(outputs) :])
        for i in wanted:
            values[i] = values[i].detach().requires_grad_()
        with torch.enable_grad():
            result = loss_fn(values, [next(rest) if isinstance(a, torch.Tensor) else a for a in arguments])
            loss, aux = result if has_aux else (result, ())
            _check_scalar(loss)
            found = gradients_of([loss], [values[i] for i in wanted], None)
        leaves, tree[0] = pytree.tree_flatten(aux)
        pairs = zip((values[i] for i in wanted), found)
        return [
            loss.detach(),
            *(leaf.detach() for leaf in leaves),
            *(torch.zeros_like(v) if g is None else g.contiguous() for v, g in pairs),
        ]

    with tracing(mode):
        types = [fresh(val) for val in (*outputs, *given)]
        function = make_fx(joint, tracing_mode="real", _allow_non_fake_inputs=True)(*types)
    return TracedLoss(function, tree[0])


def _check_scalar(loss: Any) -> None:
    if not isinstance(loss, torch.Tensor) or loss.dim() or not loss.is_floating_point():
        what = f"{loss.dtype} of shape {list(loss.shape)}" if isinstance(loss, torch.Tensor) else type(loss).__name__
        raise BindingError(f"the loss function must return a floating point scalar, not {what}; take its mean or sum")
    if not loss.requires_grad:
        raise BindingError("the loss does not depend on the model's output, so it has no gradient; look for detach() in it")


def with_loss(gm: fx.GraphModule, loss: fx.GraphModule, arguments: Sequence[Any]) -> fx.GraphModule:
    """The whole graph with a loss at its cut: it returns loss, auxiliary tensors and gradients, and waits for nothing."""
    step = clone(gm)
    name = add_function(step, "loss", loss)
    graph, results = step.graph, output_nodes(step)
    count = len(program(gm).gradients)
    cotangents = [n for n in graph.nodes if n.target is ops.cotangent]
    first = next(n for n in graph.nodes if n.op != "placeholder")
    types = [a for a in arguments if isinstance(a, torch.Tensor)]
    extra = [
        add_input(first, f"loss_argument_{i}", val, kind="input", made_by="value_and_grad") for i, val in enumerate(types)
    ]
    aux = len(output_nodes(loss)) - 1 - len(cotangents)
    names = ["loss_value", *(f"aux_{i}" for i in range(aux)), *(n.name for n in cotangents)]
    with graph.inserting_before(cotangents[0]):
        given = [*results[: len(results) - count], *extra]
        _, values = call_function(
            step, name, given, like=cotangents[0], made_by="value_and_grad", name="loss", results=names
        )
    for node, value in zip(cotangents, values[1 + aux :]):
        node.replace_all_uses_with(value)
        graph.erase_node(node)
    output = next(n for n in graph.nodes if n.op == "output")
    output.args = ((*values[: 1 + aux], *results[len(results) - count :]),)
    check_residency(update_program(finish(step), gradients=()))
    return step
