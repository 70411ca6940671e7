"""The last step: weights become state, the model's own call signature is bound, the graph becomes a module that runs."""

from __future__ import annotations

import contextlib
import inspect
import warnings
from collections.abc import Callable, Iterable
from typing import Any, NoReturn

import torch
from torch import fx, nn

from squareq_fx import ops
from squareq_fx.binding import Binding
from squareq_fx.errors import RuntimeStateError
from squareq_fx.ir import Level, Stage, clone, identifier, info, program
from squareq_fx.runtime import Runtime, StepReport, WeightStore
from squareq_fx.runtime.store import Backing
from squareq_fx.skeleton import skeleton
from squareq_fx.slab.reader import Slab
from squareq_fx.weights import WeightValues

__all__ = ["CompiledModule", "emit"]


class CompiledModule(fx.GraphModule):
    """What `compile` returns: a `torch.fx.GraphModule` that is called as the model is.

    `graph`, `code` and `print_readable()` show the top level, its GraphModule children are the unique functions. The
    compute type and the device are those it was compiled for: `.half()` or `.to(dtype)` change nothing (and warn), `.to` of
    another device raises.

    Attributes:
        history: every stage from capture on; `stage.graph` is the graph as it was then.
        runtime: loads and evicts the weights; None if the graph was emitted before `stream`.
        config: the model's, if it has one.
    """

    _binding: Binding
    runtime: Runtime | None

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
        """Release the device arena and the pinned host memory. May be called twice; later calls of the module raise."""
        if self.runtime is not None:
            self.runtime.shutdown()

    def recompile(self) -> Any:
        code = super().recompile()
        cls = type(self)
        if "_binding" in self.__dict__:  # emit has bound it; until then `forward` is the graph's own
            self.__dict__["_run_graph"] = cls.forward
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


class _Held(nn.Module):
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


def emit(
    gm: fx.GraphModule,
    model: nn.Module,
    slab: Slab,
    *,
    backing: Backing = "host",
    keep_resident: Iterable[str] = (),
) -> CompiledModule:
    """A runnable module from a graph at any stage.

    Args:
        gm: what `pipeline.run` returned; unchanged. Weights that are still inputs become resident parameters and buffers.
        model: where weights the slab does not hold come from; may live on `meta`.
        slab: the quantised weights.
        backing, keep_resident: see `WeightStore`.

    Raises:
        SlabError: a weight has no value, or its bytes in the slab are damaged.
    """
    record = program(gm)
    values = WeightValues(model, slab, record.constants)
    inputs = {str(info(n).key): n for n in gm.graph.nodes if n.op == "placeholder" and info(n).kind == "weight"}
    streamed = [p.key for packed in record.segments.values() for p in packed]
    values.require([*inputs, *streamed])
    binding = Binding(gm, type(model).__name__)

    body = clone(gm)
    root = nn.Module()
    for name, child in body.named_children():
        root.add_module(name, child)
    for key, node in inputs.items():
        _attach(root, body.graph, key, values.tensor(key, node.meta["val"].dtype).to(record.device))
    compiled = CompiledModule(root, body.graph, class_name=f"Compiled{type(model).__name__}")
    compiled.meta = dict(body.meta)
    state = compiled.__dict__
    state["_binding"] = binding
    state["_original"] = skeleton(model)[0]
    state["config"] = getattr(model, "config", None)
    state["runtime"] = _runtime(gm, values, slab, backing, keep_resident) if record.level >= Level.STREAMED else None
    for path, holder in list(compiled.named_modules()):
        if type(holder) is nn.Module:
            _Held.take(holder, state["_original"], path.removeprefix("weights."))
    compiled.eval()
    compiled.recompile()
    return compiled


def _attach(root: nn.Module, graph: fx.Graph, key: str, value: torch.Tensor) -> None:
    """The weight becomes a parameter or buffer under its own name, its placeholder a `get_attr`."""
    node = next(n for n in graph.nodes if n.op == "placeholder" and info(n).key == key and info(n).kind == "weight")
    path = _free_path(root, key)
    owner = root
    for part in path.split(".")[:-1]:
        if part not in dict(owner.named_children()):
            owner.add_module(part, nn.Module())
        owner = owner.get_submodule(part)
    leaf = path.rpartition(".")[2]
    quantised = info(node).layer is not None
    if value.is_floating_point() and not quantised:
        owner.register_parameter(leaf, nn.Parameter(value, requires_grad=False))
    else:
        owner.register_buffer(leaf, value)
    with graph.inserting_before(node):
        attribute = graph.create_node("get_attr", path, name=identifier(key))
    attribute.meta = dict(node.meta)
    node.replace_all_uses_with(attribute)
    graph.erase_node(node)


def _free_path(root: nn.Module, key: str) -> str:
    """`key`, unless its first part is the name of a function of the graph or of an attribute of the module."""
    first = key.partition(".")[0]
    taken = isinstance(getattr(root, first, None), fx.GraphModule) or hasattr(CompiledModule, first)
    taken = taken or first in ("config", "meta", "runtime", "training")
    return f"weights.{key}" if taken else key


def _runtime(
    gm: fx.GraphModule, values: WeightValues, slab: Slab, backing: Backing, keep_resident: Iterable[str]
) -> Runtime:
    record = program(gm)
    segments = [values.segment(name, packed) for name, packed in record.segments.items()]
    keys = {name: values.slab_keys(packed) for name, packed in record.segments.items()}
    store = WeightStore(
        slab.data,
        segments,
        backing=backing,
        keep_resident=keep_resident,
        verify=lambda name: slab.verify_segment(keys[name]),
    )
    return Runtime(store, device=record.device, arena_bytes=record.arena_bytes)


def _bound_forward(module: CompiledModule) -> Callable[..., Any]:
    def forward(self: CompiledModule, *args: Any, **kwargs: Any) -> Any:
        tensors, return_dict = self._binding.tensors(args, kwargs)
        if self.runtime is not None and torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
            raise RuntimeStateError(
                "an input requires grad, but what autograd would save of the streamed weights is overwritten before its "
                "backward. Call the module under torch.no_grad(), or detach its inputs."
            )
        with contextlib.ExitStack() as stack:
            if self.runtime is not None:
                stack.enter_context(self.runtime.step())
                stack.enter_context(ops.activate(self.runtime))
            flat = self.__dict__["_run_graph"](self, *tensors)
        return self._binding.output(flat, return_dict)

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

