"""What `compile` returns: a GraphModule that is called, trained and looked at as the model is."""

from __future__ import annotations

import contextlib
import functools
import inspect
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import fx, nn

from squareq_fx import ops
from squareq_fx.adapter_methods import AdapterMethods
from squareq_fx.binding import Binding
from squareq_fx.errors import RuntimeStateError
from squareq_fx.ir import Stage, program
from squareq_fx.lowering.backends import Lowering
from squareq_fx.lowering.lowered import Lowered
from squareq_fx.runtime import Runtime, StepReport
from squareq_fx.training import Training

__all__ = ["CompiledModule", "Held"]


class CompiledModule(AdapterMethods, fx.GraphModule):
    """What `compile` returns: a `torch.fx.GraphModule` that is called as the model is.

    `graph`, `code` and `print_readable()` show the top level of the forward, its GraphModule children are the unique functions;
    `training_step` has the halves that run when gradients are wanted, `history` the whole graph with its backward. The compute
    type and the device are those it was compiled for: `.half()` or `.to(dtype)` change nothing (and warn), `.to` of another
    device raises.

    Attributes:
        history: every stage from capture on; `stage.graph` is the graph as it was then.
        runtime: loads and evicts the weights; None if the graph was emitted before `stream`.
        lowering: how the functions run: the backend, and what Inductor compiled.
        training_step: forward and backward, if it was compiled with adapters or inputs to differentiate by; else None.
        config: the model's, if it has one.
    """

    _binding: Binding
    runtime: Runtime | None
    lowering: Lowering
    training_step: Training | None

    @property
    def history(self) -> tuple[Stage, ...]:
        return program(self).history

    @property
    def dtype(self) -> torch.dtype:
        """The floating point type of the model's inputs and weights that are not quantised."""
        return program(self).dtype

    @property
    def device(self) -> torch.device:
        return program(self).device

    @property
    def last_step(self) -> StepReport | None:
        """Bytes moved, copy, compute and stall time of the last call; None before the first, or without streaming."""
        return self.runtime.last_step if self.runtime is not None else None

    def shutdown(self) -> None:
        """Release the device arena, the pinned host memory and what was recorded. May be called twice; later calls raise."""
        for one in self.lowered():
            one.close()
        if self.runtime is not None:
            self.runtime.shutdown()

    def adapter_parameters(self) -> dict[str, nn.Parameter]:
        """What trains: A and B of the active adapters, float32, by their names in `named_parameters`."""
        return self._adapters.parameters()

    def recompile(self) -> Any:
        code = super().recompile()
        cls = type(self)
        if "_binding" in self.__dict__:  # emit has bound it; until then `forward` is the graph's own
            self.__dict__["_run_graph"] = functools.partial(cls.forward, self)
            self.__dict__["_lowered"] = Lowered(self, self.__dict__["_run_graph"], self.lowering)
            cls.forward = _bound_forward(self)
        return code

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> CompiledModule:
        """Quantised weights, scales and the graph's types are fixed; see the class."""

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            moved = fn(tensor)
            if moved.device != self.device:
                raise RuntimeStateError(
                    f"this module was compiled for {self.device}; compile again with device={str(moved.device)!r}"
                )
            if moved.dtype != tensor.dtype:
                _warn_of_dtype(self.dtype)
                return tensor
            return moved

        keep(torch.empty((), dtype=self.dtype, device=self.device))
        return super()._apply(keep, recurse)

    def lowered(self) -> tuple[Lowered, ...]:
        """What runs the module's graphs: the forward, and the halves of `training_step`."""
        return (self.__dict__["_lowered"], *(self.training_step.lowered if self.training_step is not None else ()))

    def _linear_sizes(self) -> dict[str, tuple[int, int]]:
        layers = self.__dict__["_original"].named_modules()
        return {path: (m.out_features, m.in_features) for path, m in layers if isinstance(m, nn.Linear)}

    def _run(self, half: Callable[..., Any], tensors: Sequence[Any]) -> Any:
        """A graph of this module on its flat inputs, as one step of the runtime; its types hold under autocast too."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.autocast(self.device.type, enabled=False))
            if self.runtime is not None:
                stack.enter_context(self.runtime.step())
                stack.enter_context(ops.activate(self.runtime))
            return half(*tensors)

    def _flat(self, tensors: list[torch.Tensor]) -> Sequence[torch.Tensor]:
        """The model's outputs for its flat inputs; connected to what requires grad, if the module can train."""
        training, bank = self.training_step, self._bank
        wants = [p for p, t in zip(self._binding.call.input_paths, tensors) if t.requires_grad]
        if torch.is_grad_enabled() and wants:
            known = training.differentiable_inputs if training is not None else ()
            if self.runtime is not None and not set(wants) <= set(known):
                missing = next(path for path in wants if path not in known)
                raise RuntimeStateError(
                    f"an input requires grad ({missing}), but the module was compiled without a gradient by it. Compile with "
                    f"inputs=({missing!r},), call the module under torch.no_grad(), or detach its inputs."
                )
        branches = bank.branches() if bank is not None else []
        packed = bank.packed(branches) if bank is not None else []
        trains = wants or any(part.down.requires_grad or part.up.requires_grad for b in branches for part in b.parts)
        if training is not None and torch.is_grad_enabled() and trains:
            return training(tensors, branches, packed)
        if self.runtime is None:  # an early stage: autograd may go through the resident weights
            return self._run(self.__dict__["_run_graph"], [*tensors, *packed])
        with torch.no_grad():
            return self._run(self.__dict__["_lowered"], [*tensors, *packed])

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            original = self.__dict__.get("_original")
            found = getattr(original, name, None) if original is not None else None
            if isinstance(found, nn.Module) or (name == "cache_context" and found is not None):
                return found  # pipelines look up submodules (`unet.add_embedding.linear_1.in_features`), never to run them
            raise

    def __deepcopy__(self, memo: dict[int, Any]) -> NoReturn:
        raise RuntimeStateError("a compiled module owns device memory and cannot be copied; compile the model again")

    def __reduce__(self) -> NoReturn:
        raise RuntimeStateError("a compiled module cannot be pickled; keep the slab and compile the model again")


class Held(nn.Module):
    """Holds resident weights under the model's names; everything else of that name is the model's own, to be looked at."""

    @classmethod
    def take(cls, holder: nn.Module, model: nn.Module, path: str) -> None:
        holder.__class__ = cls
        with contextlib.suppress(AttributeError):
            holder.__dict__["_original"] = model.get_submodule(path)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "_original" not in self.__dict__:
                raise
            return getattr(self.__dict__["_original"], name)

    def __len__(self) -> int:
        return len(self.__dict__["_original"])

    def __getitem__(self, index: Any) -> Any:
        return self.__dict__["_original"][index]

    def __bool__(self) -> bool:
        return True


def _bound_forward(module: CompiledModule) -> Callable[..., Any]:
    def forward(self: CompiledModule, *args: Any, **kwargs: Any) -> Any:
        tensors, return_dict = self._binding.tensors(args, kwargs)
        return self._binding.output(self._flat(tensors), return_dict)

    signature = module._binding.call.signature
    this = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    forward.__signature__ = signature.replace(parameters=[this, *signature.parameters.values()])  # type: ignore[attr-defined]
    return forward


def _warn_of_dtype(dtype: torch.dtype) -> None:
    warnings.warn(
        f"the compiled module keeps computing in {dtype}: its types are part of the graph. Convert the model and compile "
        "again.",
        UserWarning,
        stacklevel=6,
    )
