"""Tracing the skeleton with `torch.export`: sizes stay symbols, arguments of blocks keep their names."""

from __future__ import annotations

import contextlib
import functools
import gc
import inspect
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from squareq_fx.calls import flatten_call
from squareq_fx.errors import CaptureError
from squareq_fx.ops import argument
from squareq_fx.tracing.repeats import Repeats, again
from squareq_fx.tracing.shape_rules import shape_rules
from squareq_fx.tracing.skeleton import skeleton

__all__ = ["Skeleton", "on_meta"]

_MIXES_DEVICES = ("is not on the expected device meta", "found two different devices", "found at least two devices")
_AUTO = torch.export.Dim.AUTO


def on_meta(tensor: torch.Tensor) -> torch.Tensor:
    """An empty tensor of the same size and dtype; strides are contiguous."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")


class Skeleton:
    """The model's modules with all tensors on `meta`, and a `forward` that takes and returns flat tuples of tensors."""

    def __init__(
        self,
        model: nn.Module,
        build: Callable[[Any], inspect.BoundArguments],
        dims: dict[str, tuple[str | None, ...]] | None,
    ) -> None:
        self.model_name = type(model).__name__
        self.dims = list(dims.values()) if dims is not None else None
        self.output_leaves: tuple[tuple[Any] | None, ...] = ()
        self.output_spec: Any = None
        self.branches: list[Any] = []
        self.default_device: torch.device | None = None
        self.repeats: Repeats | None = None
        self.module, self.constants = skeleton(model)
        self._wrap_forward(build)

    @property
    def tokens(self) -> list[str]:
        """Symbols that occur as a multiple: an input of that size is traced along, so that sizes are simple expressions.

        With `4*height` known to be a multiple of 4 the sizes of an SDXL UNet stay polynomials; without, they become nested
        floor divisions and tracing takes half again as long.
        """
        dims = [d for shape in self.dims or [] for d in shape if d is not None and "*" in d]
        return sorted({d.rpartition("*")[2] for d in dims})

    def _wrap_forward(self, build: Callable[[Any], inspect.BoundArguments]) -> None:
        cls, owner = type(self.module), self
        count = len(self.tokens)

        def forward(module: nn.Module, *flat: torch.Tensor) -> tuple[torch.Tensor, ...]:
            tokens, tensors = flat[:count], flat[count:]
            if owner.repeats is not None:
                owner.repeats.begin()
            owner._state_relations(tokens, tensors)
            call = build(tensors)
            with owner.default_device or contextlib.nullcontext(), _Literals(owner.default_device):
                return owner._flatten_output(super(traced, module).forward(*call.args, **call.kwargs))  # type: ignore[misc, arg-type]

        traced = type(cls.__name__, (cls,), {"forward": forward, "__module__": cls.__module__})
        self.module.__class__ = traced

    def trace_once(self, blocks: Sequence[str], identity: Callable[[nn.Module], str | None]) -> bool:
        """Trace blocks that are one program once (`Repeats`). Returns whether there can be any."""
        repeats = Repeats(self.module, blocks, identity)
        self.repeats = repeats if repeats.found else None
        return repeats.found

    def name_arguments(self, blocks: tuple[str, ...]) -> None:
        """While tracing, every block says what it calls the tensors it is given: the names a reader knows them by."""
        for path in blocks:
            module = self.module.get_submodule(path)
            names = list(inspect.signature(module.forward).parameters)

            module.register_forward_pre_hook(functools.partial(_tell, path, names), with_kwargs=True)

    def _state_relations(self, tokens: tuple[torch.Tensor, ...], tensors: tuple[torch.Tensor, ...]) -> None:
        sizes: dict[str, Any] = {name: token.shape[0] for name, token in zip(self.tokens, tokens)}
        for tensor, dims in zip(tensors, self.dims or []):
            for size, dim in zip(tensor.shape, dims):
                if dim is None:
                    continue
                factor, _, name = dim.rpartition("*")
                torch._check(size == int(factor or 1) * sizes.setdefault(name, size))

    def _flatten_output(self, output: Any) -> tuple[torch.Tensor, ...]:
        leaves, self.output_spec = pytree.tree_flatten(output)
        if any(isinstance(leaf, torch.SymInt | torch.SymFloat | torch.SymBool) for leaf in leaves):
            raise CaptureError(
                f"{self.model_name}: forward returns a size of its inputs, which a graph of tensors does not hold; read it off "
                "the shape of what is returned"
            )
        self.output_leaves = tuple(None if isinstance(leaf, torch.Tensor) else (leaf,) for leaf in leaves)
        return tuple(leaf for leaf in leaves if isinstance(leaf, torch.Tensor))

    def export(self, tensors: list[torch.Tensor]) -> Any:
        if self.dims is not None:
            multiples = self._token_sizes(tensors)
            tokens = [torch.empty(multiples[name], device="meta") for name in self.tokens]
            dynamic = [{i: _AUTO for i, d in enumerate(dims) if d is not None} for dims in self.dims]
            return self._try([*tokens, *tensors], [{0: _AUTO} for _ in tokens] + dynamic)
        dynamic = [dict.fromkeys(range(t.dim()), _AUTO) for t in tensors]
        widened = _widen_batch(tensors)
        if widened is not None:
            try:
                exported = self._try(widened, dynamic)
                if self._holds_for(exported, tensors):
                    return exported
                what = "its forward does something else for a batch of 2"
            except CaptureError:
                if self.repeats is not None:
                    raise  # it may be the shortcut that failed
                what = "a batch of 2 could not be traced"
            warnings.warn(f"{self.model_name}: {what}, so the captured graph takes batch 1 only", stacklevel=4)
        return self._try(tensors, dynamic)

    def _holds_for(self, exported: Any, tensors: list[torch.Tensor]) -> bool:
        """Whether the trace is the model's program for inputs of these sizes too."""
        users = set(exported.graph_signature.user_inputs)
        found = [n.meta["val"] for n in exported.graph.nodes if n.op == "placeholder" and n.name in users]
        pairs = [pair for val, tensor in zip(found, tensors) for pair in zip(val.shape, tensor.shape)]
        sizes = {size.node.expr: extent for size, extent in pairs if isinstance(size, torch.SymInt)}
        environments = {size.node.shape_env for size, _ in pairs if isinstance(size, torch.SymInt)}
        conditions = [(env, c) for env in environments for c in (*(g.expr for g in env.guards), *self.branches)]
        decided = [env.replace(condition).subs(sizes) for env, condition in conditions]
        return all(bool(answer) for answer in decided if not answer.free_symbols)

    def _token_sizes(self, tensors: list[torch.Tensor]) -> dict[str, int]:
        sizes: dict[str, int] = {}
        for tensor, dims in zip(tensors, self.dims or []):
            for extent, dim in zip(tensor.shape, dims):
                factor, _, name = (dim or "").rpartition("*")
                if factor:
                    sizes[name] = extent // int(factor)
        return sizes

    def _try(self, tensors: list[torch.Tensor], dynamic: list[dict[int, Any]]) -> Any:
        try:
            return self._traced(tensors, dynamic)
        except CaptureError as error:
            if self.default_device is not None or not any(phrase in str(error) for phrase in _MIXES_DEVICES):
                raise
        # The forward makes tensors without saying where, which is right for a model on the default device: let that be `meta`.
        self.default_device = torch.device("meta")
        return self._traced(tensors, dynamic)

    def _traced(self, tensors: list[torch.Tensor], dynamic: list[dict[int, Any]]) -> Any:
        fresh = tuple(on_meta(t) for t in tensors)  # Dim.AUTO marks the tensors it is given
        try:
            with torch.no_grad(), warnings.catch_warnings(), _paused_collector(), _noting_branches() as self.branches:
                warnings.simplefilter("ignore")
                with self.repeats.tracing() if self.repeats is not None else contextlib.nullcontext():
                    with shape_rules():
                        exported = torch.export.export(self.module, fresh, dynamic_shapes=(tuple(dynamic),), strict=False)
                    writes = {node.target for node in exported.graph.nodes if _mutates(node)}
                    copies = any(node.target is again for node in exported.graph.nodes)
                    if copies and writes - {torch.ops.aten.detach_.default}:
                        raise CaptureError(f"{self.model_name}: forward writes into tensors, so each block must be traced")
                    if writes:
                        exported = exported.run_decompositions({})
                return exported
        except CaptureError:
            raise
        except Exception as error:
            raise CaptureError(
                f"torch.export could not trace {self.model_name}: {_reason(error)}\n"
                "The forward must not branch on tensor values or call untraceable code; with example_inputs you choose "
                "which optional arguments are traced."
            ) from error


@contextlib.contextmanager
def _noting_branches() -> Iterator[list[Any]]:
    """Collects the conditions on sizes that Python code outside torch branched on, as they turned out.

    `torch.export` takes every dynamic size to be 2 or more, so it records no condition for `if x.shape[0] == 1`, and the trace
    would silently be the wrong program for a batch of 1.
    """
    import sympy  # here, because importing this package must not take the half second it needs

    taken: list[Any] = []
    original, inside = torch.SymBool.__bool__, os.path.dirname(torch.__file__) + os.sep

    def noting(self: torch.SymBool) -> bool:
        answer = original(self)
        if not sys._getframe(1).f_code.co_filename.startswith(inside):
            condition = sympy.sympify(self.node.expr)
            if condition.free_symbols:
                taken.append(condition if answer else sympy.Not(condition))
        return answer

    torch.SymBool.__bool__ = noting  # type: ignore[method-assign]
    try:
        yield taken
    finally:
        torch.SymBool.__bool__ = original  # type: ignore[method-assign]


class _Literals(TorchFunctionMode):
    """What a forward makes of Python values stays true: `torch.tensor([1, 2], device=x.device)` keeps its numbers, which `meta`
    would lose, and `torch.tensor([x.shape[0]])` its size, which `torch.tensor` would make a constant.

    Args:
        default: where tensors are made for which the forward names no device.
    """

    def __init__(self, default: torch.device | None) -> None:
        super().__init__()
        self.default = default

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in _MAKERS:  # nearly always; a model calls thousands of functions
            return func(*args, **(kwargs or {}))
        kwargs = dict(kwargs or {})
        if func in (torch.tensor, torch.as_tensor) and args and not isinstance(args[0], torch.Tensor):
            return _made(args[0], kwargs.pop("dtype", None), kwargs.pop("device", None) or self.default, kwargs)
        if func is torch.Tensor.new_tensor and len(args) == 2 and not isinstance(args[1], torch.Tensor):
            dtype, device = kwargs.pop("dtype", None), kwargs.pop("device", None)
            return _made(args[1], dtype or args[0].dtype, device or args[0].device, kwargs)
        return func(*args, **kwargs)


_MAKERS = {torch.tensor, torch.as_tensor, torch.Tensor.new_tensor}


def _made(data: Any, dtype: torch.dtype | None, device: Any, kwargs: dict[str, Any]) -> torch.Tensor:
    values = list(data) if isinstance(data, list | tuple) else [data]
    if any(isinstance(value, torch.SymInt) for value in values):
        filled = [torch.full((), value, dtype=dtype, device=device) for value in values]
        return torch.stack(filled) if isinstance(data, list | tuple) else filled[0]
    if device is not None and torch.device(device).type == "meta":
        return torch.tensor(data, dtype=dtype, device="cpu", **kwargs).to(device)
    return torch.tensor(data, dtype=dtype, device=device, **kwargs)


def _tell(path: str, names: list[str], _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """A forward pre-hook that records which of the block's arguments each tensor is."""
    for name, leaf in flatten_call(dict(zip(names, args)) | kwargs).items():
        if isinstance(leaf, torch.Tensor):
            argument(leaf, path, name)


def _widen_batch(tensors: list[torch.Tensor]) -> list[torch.Tensor] | None:
    """The same tensors with a leading size of 1 made 2, since `torch.export` takes a 1 for a constant."""
    if not any(t.dim() and t.shape[0] == 1 for t in tensors):
        return None
    return [
        torch.empty((2, *t.shape[1:]), dtype=t.dtype, device="meta") if t.dim() and t.shape[0] == 1 else t
        for t in tensors
    ]


@contextlib.contextmanager
def _paused_collector() -> Iterator[None]:
    """Tracing makes millions of objects that stay; collecting garbage among them costs a quarter of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _reason(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: " + ("\n  ".join(text[:12]) if text else "no message")


def _mutates(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable
