"""`value_and_grad`: loss and gradients of a compiled module as one pure function, whose graph can be printed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from squareq_fx.adapters.packing import pack, unpack_gradients
from squareq_fx.calls import normalise_example
from squareq_fx.compiled import CompiledModule
from squareq_fx.errors import BindingError, RuntimeStateError
from squareq_fx.gradients.loss import matched, trace_loss, with_loss
from squareq_fx.lowering.lowered import Lowered
from squareq_fx.specs import spec

__all__ = ["ValueAndGrad", "value_and_grad"]


def value_and_grad(module: CompiledModule, loss_fn: Callable[..., Any], *, has_aux: bool = False) -> ValueAndGrad:
    """A function that computes a loss and its gradient by the adapters, in one pass over the streamed weights.

        step = squareq_fx.value_and_grad(module, lambda output, target: (output.sample - target).square().mean())
        params = dict(module.adapter_parameters())
        loss, grads = step(params, {"hidden_states": x, "timestep": t}, target)

    Args:
        module: compiled with adapters. Its own parameters are neither read nor written, only which adapters are active counts.
        loss_fn: from what the module returns, and further arguments, to a scalar. It is traced: Python branches on values are
            not seen again.
        has_aux: `loss_fn` returns `(loss, aux)`, and the function `((loss, aux), grads)`, as in JAX.

    Raises:
        RuntimeStateError: the module has no backward by adapters.
    """
    if module.training_step is None or module._bank is None:
        raise RuntimeStateError("value_and_grad needs a module with adapters; compile it with lora=squareq_fx.Lora(...)")
    return ValueAndGrad(module, loss_fn, has_aux)


class ValueAndGrad:
    """Calls `(params, inputs, *loss_arguments)`; see `value_and_grad`. Dynamic in every size the module is dynamic in."""

    def __init__(self, module: CompiledModule, loss_fn: Callable[..., Any], has_aux: bool) -> None:
        assert module.training_step is not None and module._bank is not None
        self.module, self._training, self._bank = module, module.training_step, module._bank
        self._loss_fn, self._has_aux = loss_fn, has_aux
        self._graphs: dict[Any, tuple[fx.GraphModule, Lowered, Any]] = {}

    def __call__(
        self, params: Mapping[str, torch.Tensor], inputs: Mapping[str, Any] | Sequence[Any], *arguments: Any
    ) -> tuple[Any, dict[str, torch.Tensor]]:
        """The loss and one float32 gradient for each of `params`.

        Args:
            params: values by the names of `module.adapter_parameters()`.
            inputs: the module's call: keywords as a dict, positions as a tuple, or a pair of both.
            arguments: further arguments of the loss: tensors, containers of them, or constants.

        Raises:
            BindingError: params or inputs are missing, unknown, or of other shapes.
        """
        tensors = self._tensors(inputs)
        branches = self._bank.branches(self._checked(params))
        _, run, aux_tree = self._graph(tensors, arguments)
        leaves = [leaf for leaf in pytree.tree_leaves(arguments) if isinstance(leaf, torch.Tensor)]
        with torch.no_grad():
            given = self._training.arguments(tensors, pack(branches, self.module.device))
            loss, *rest = self.module._run(run, [*given, *leaves])
            found = dict(zip(self._training.gradients, rest[len(rest) - len(self._training.gradients) :]))
            pairs = unpack_gradients(branches, [found.get(("adapter", key)) for key in self._training.adapters])
        gradients: dict[str, torch.Tensor] = {}
        for names, pair in zip(self._bank.part_names(), pairs):
            for name, gradient in zip(names, pair):  # the output may not depend on a parameter
                gradients[name] = torch.zeros_like(params[name]) if gradient is None else gradient
        if not self._has_aux:
            return loss, gradients
        aux = pytree.tree_unflatten(rest[: len(rest) - len(self._training.gradients)], aux_tree)
        return (loss, aux), gradients

    def trace(self, inputs: Mapping[str, Any] | Sequence[Any], *arguments: Any) -> fx.GraphModule:
        """The graph that a call with these arguments runs: forward, loss, backward, with every load and evict."""
        return self._graph(self._tensors(inputs), arguments)[0]

    def _tensors(self, inputs: Mapping[str, Any] | Sequence[Any]) -> list[torch.Tensor]:
        args, kwargs = normalise_example(inputs)
        return self.module._binding.tensors(args, kwargs)[0]

    def _checked(self, params: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        wanted = self._bank.parameters()
        wrong = [f"{n} is missing" for n in wanted if n not in params]
        wrong += [f"{n} belongs to no active adapter" for n in params if n not in wanted]
        wrong += [
            f"{n} is {list(params[n].shape)}, not {list(p.shape)}"
            for n, p in wanted.items()
            if n in params and params[n].shape != p.shape
        ]
        if wrong:
            more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
            raise BindingError(f"value_and_grad: {'; '.join(wrong[:3])}{more}. Start from module.adapter_parameters().")
        return params

    def _graph(self, tensors: list[torch.Tensor], arguments: tuple[Any, ...]) -> tuple[fx.GraphModule, Lowered, Any]:
        leaves, tree = pytree.tree_flatten(arguments)
        binding, outputs = self.module._binding, self._training.output_values
        types = matched(leaves, [(val, binding.concrete(val, tensors)) for val in outputs])
        key = (str(tree), tuple(spec(t) if isinstance(t, torch.Tensor) else repr(t) for t in types))
        if key not in self._graphs:

            def loss_fn(flat: Sequence[torch.Tensor], given: Sequence[Any]) -> Any:
                return self._loss_fn(binding.output(flat, return_dict=True), *pytree.tree_unflatten(list(given), tree))

            traced = trace_loss(loss_fn, outputs, self._training.halves.outputs, types, has_aux=self._has_aux)
            graph = with_loss(self._training.whole, traced.function, types)
            self._graphs[key] = graph, Lowered(graph), traced.aux
        return self._graphs[key]
