"""A model becomes a flat graph whose every parameter, buffer and constant is an explicit input.

`torch.export` (non-strict) traces a skeleton of the model: the same modules with all tensors on `meta`. No weight is read,
copied or moved, so a model that fits no memory can be captured. Afterwards the graph is moved to the device it will run
on. Source: https://docs.pytorch.org/docs/stable/export.html
"""

from __future__ import annotations

import contextlib
import copy
import gc
import inspect
import operator
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import sympy
import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from squareq_fx.blocks import block_paths
from squareq_fx.calls import bind, flatten_call, normalise_example, rebuild_call
from squareq_fx.errors import BindingError, CaptureError
from squareq_fx.families import family_inputs
from squareq_fx.inference import infer
from squareq_fx.ir import CallSpec, Level, Program, fake_mode, identifier, info, set_info, set_program
from squareq_fx.ops import argument
from squareq_fx.slab.inputs import restore_inputs
from squareq_fx.slab.manifest import model_signature
from squareq_fx.slab.reader import Slab
from squareq_fx.specs import spec

__all__ = ["capture", "skeleton"]

_AUTO = torch.export.Dim.AUTO


def capture(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    slab: Slab | None = None,
    device: torch.device | str | None = None,
    block_pattern: str | None = None,
) -> fx.GraphModule:
    """The model's forward as a flat graph of aten operations.

    Args:
        model: any module `torch.export` can trace, real or on `meta`; it is neither changed nor moved. Dropout and the
            like are captured in eval mode.
        example_inputs: a dict (keywords), a tuple (positions) or a pair of both. Only sizes and dtypes are read. Every
            size is dynamic as far as the model allows. Default: the slab's recorded inputs, else those of a known
            diffusers family.
        slab: consulted for example inputs and block paths.
        device: where the graph will run; default: where the model's parameters are, the CPU for `meta`.
        block_pattern: see `block_paths`.

    Returns:
        A GraphModule with one placeholder for each tensor argument, then one for each weight; its output is a tuple of
        the tensors in the model's output. It computes what the model computes in eval mode.

    Raises:
        CaptureError: no example inputs are known, or `torch.export` cannot trace the model (with its reason).
    """
    target = _device(model, device)
    arguments, signature, dims = _example(model, example_inputs, slab)
    paths = [p for p, leaf in flatten_call(arguments).items() if isinstance(leaf, torch.Tensor)]
    tensors = [leaf for leaf in flatten_call(arguments).values() if isinstance(leaf, torch.Tensor)]
    if not tensors:
        raise CaptureError(f"{type(model).__name__}: the example inputs hold no tensor, so there is nothing to trace")
    start = time.perf_counter()
    stored = slab.block_paths if slab is not None and block_pattern is None else ()
    blocks = tuple(stored) or block_paths(model, block_pattern)
    traced = _Skeleton(model, rebuild_call(signature, arguments), dims)
    traced.name_arguments(blocks)
    exported = traced.export(tensors)
    gm = _explicit(exported, traced, paths, model)
    guards = tuple(dict.fromkeys((*(guard.expr for guard in fake_mode(gm).shape_env.guards), *traced.branches)))
    _relocate(gm, target)
    literals = {p: v for p, v in flatten_call(arguments).items() if not isinstance(v, torch.Tensor) and p != "return_dict"}
    return set_program(
        gm,
        Program(
            level=Level.CAPTURED,
            call=CallSpec(signature, tuple(paths), literals, traced.output_leaves, traced.output_spec),
            model_class=f"{type(model).__module__}.{type(model).__qualname__}",
            model_signature=model_signature(model),
            block_paths=blocks,
            device=target,
            dtype=next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32),
            guards=guards,
            capture_seconds=time.perf_counter() - start,
            constants=traced.constants,
            tied=_tied(model),
        ),
    )


def _device(model: nn.Module, device: torch.device | str | None) -> torch.device:
    if device is None:
        first = next((t.device for t in model.parameters()), torch.device("cpu"))
        device = "cpu" if first.type == "meta" else first
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device() if torch.cuda.is_available() else 0)
    return device


def _example(
    model: nn.Module, example_inputs: Any, slab: Slab | None
) -> tuple[dict[str, Any], inspect.Signature, dict[str, tuple[str | None, ...]] | None]:
    """Bound arguments with every tensor on `meta`; for a known family also the symbols of each tensor's dimensions."""
    signature = inspect.signature(model.forward)
    family = family_inputs(model)
    recorded = slab.input_signature if slab is not None else None
    if example_inputs is not None:
        args, kwargs = normalise_example(example_inputs)
    elif recorded is not None:
        args, kwargs = restore_inputs(recorded, device="meta")
    elif family is not None:
        args, kwargs = family.args, family.kwargs
    else:
        raise CaptureError(
            f"it is not known what to call {type(model).__name__}{signature} with: pass "
            "example_inputs={'argument': tensor, ...} (the tensors may live on 'meta')"
        )
    try:
        arguments = dict(bind(signature, args, kwargs, f"example_inputs of {type(model).__name__}").arguments)
    except BindingError as error:
        raise CaptureError(str(error)) from error
    arguments = pytree.tree_map_only(torch.Tensor, _on_meta, arguments)
    if "return_dict" in signature.parameters:
        arguments["return_dict"] = True  # a tuple can be made from the output class, not the other way round
    if family is None:
        return arguments, signature, None
    known, symbols = flatten_call(family.kwargs), _flatten_dims(family.dims)
    given = {p: t for p, t in flatten_call(arguments).items() if isinstance(t, torch.Tensor)}
    if not all(p in known and isinstance(known[p], torch.Tensor) and known[p].dim() == t.dim() for p, t in given.items()):
        return arguments, signature, None
    # The family knows which sizes vary: trace at its sizes, which are distinct and never 1, with the dtypes given.
    sizes = {p: _family_size(known[p], symbols[p], t) for p, t in given.items()}
    fresh = iter([torch.empty(sizes[p], dtype=t.dtype, device="meta") for p, t in given.items()])
    arguments = pytree.tree_map_only(torch.Tensor, lambda _: next(fresh), arguments)
    return arguments, signature, {p: symbols[p] for p in given}


def _flatten_dims(dims: Mapping[str, Any]) -> dict[str, tuple[str | None, ...]]:
    """A family's `dims` by the same paths as `flatten_call` gives its tensors."""
    result: dict[str, tuple[str | None, ...]] = {}
    for name, value in dims.items():
        if isinstance(value, dict):
            result.update({f"{name}['{k}']": v for k, v in value.items()})
        else:
            result[name] = value
    return result


def _family_size(known: torch.Tensor, symbols: tuple[str | None, ...], given: torch.Tensor) -> list[int]:
    return [k if s is not None else g for k, s, g in zip(known.shape, symbols, given.shape)]


def _on_meta(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")


class _Skeleton:
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
            owner._state_relations(tokens, tensors)
            call = build(tensors)
            with _Literals():
                return owner._flatten_output(super(traced, module).forward(*call.args, **call.kwargs))  # type: ignore[misc, arg-type]

        traced = type(cls.__name__, (cls,), {"forward": forward, "__module__": cls.__module__})
        self.module.__class__ = traced

    def name_arguments(self, blocks: tuple[str, ...]) -> None:
        """While tracing, every block says what it calls the tensors it is given: the names a reader knows them by."""
        for path in blocks:
            module = self.module.get_submodule(path)
            names = list(inspect.signature(module.forward).parameters)

            def tell(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], path: str = path, names: list[str] = names) -> None:
                for name, leaf in flatten_call(dict(zip(names, args)) | kwargs).items():
                    if isinstance(leaf, torch.Tensor):
                        argument(leaf, path, name)

            module.register_forward_pre_hook(tell, with_kwargs=True)

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
                return self._try(widened, dynamic)
            except CaptureError:
                warnings.warn(
                    f"{self.model_name}: a batch of 2 could not be traced, so the captured graph takes batch 1 only",
                    stacklevel=4,
                )
        return self._try(tensors, dynamic)

    def _token_sizes(self, tensors: list[torch.Tensor]) -> dict[str, int]:
        sizes: dict[str, int] = {}
        for tensor, dims in zip(tensors, self.dims or []):
            for extent, dim in zip(tensor.shape, dims):
                factor, _, name = (dim or "").rpartition("*")
                if factor:
                    sizes[name] = extent // int(factor)
        return sizes

    def _try(self, tensors: list[torch.Tensor], dynamic: list[dict[int, Any]]) -> Any:
        fresh = tuple(_on_meta(t) for t in tensors)  # Dim.AUTO marks the tensors it is given
        try:
            with torch.no_grad(), warnings.catch_warnings(), _paused_collector(), _noting_branches() as self.branches:
                warnings.simplefilter("ignore")
                exported = torch.export.export(self.module, fresh, dynamic_shapes=(tuple(dynamic),), strict=False)
                if any(_mutates(node) for node in exported.graph.nodes):
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
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in (torch.tensor, torch.as_tensor) and args and not isinstance(args[0], torch.Tensor):
            return _made(args[0], kwargs.pop("dtype", None), kwargs.pop("device", None), kwargs)
        if func is torch.Tensor.new_tensor and len(args) == 2 and not isinstance(args[1], torch.Tensor):
            dtype, device = kwargs.pop("dtype", None), kwargs.pop("device", None)
            return _made(args[1], dtype or args[0].dtype, device or args[0].device, kwargs)
        return func(*args, **kwargs)


def _made(data: Any, dtype: torch.dtype | None, device: Any, kwargs: dict[str, Any]) -> torch.Tensor:
    values = list(data) if isinstance(data, list | tuple) else [data]
    if any(isinstance(value, torch.SymInt) for value in values):
        filled = [torch.full((), value, dtype=dtype, device=device) for value in values]
        return torch.stack(filled) if isinstance(data, list | tuple) else filled[0]
    if device is not None and torch.device(device).type == "meta":
        return torch.tensor(data, dtype=dtype, device="cpu", **kwargs).to(device)
    return torch.tensor(data, dtype=dtype, device=device, **kwargs)


def skeleton(model: nn.Module) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """The model's modules in eval mode with every tensor on `meta`, and the tensors that are plain attributes, by path.

    Nothing is read or copied but Python objects.
    """
    memo: dict[int, Any] = {id(t): _meta_twin(t) for t in (*model.parameters(), *model.buffers())}
    constants = {path: value for path, value in _plain_tensors(model) if id(value) not in memo}
    memo.update((id(value), _meta_twin(value)) for value in constants.values())
    return copy.deepcopy(model, memo).eval(), constants


def _plain_tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors that are attributes, or in a list, tuple or dict that is one, by path; parameters and buffers too."""
    for path, module in model.named_modules():
        for name, attribute in vars(module).items():
            for inner, value in pytree.tree_flatten_with_path(attribute)[0]:
                if isinstance(value, torch.Tensor):
                    yield (f"{path}.{name}" if path else name) + pytree.keystr(inner), value


def _meta_twin(tensor: torch.Tensor) -> torch.Tensor:
    twin = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
    return nn.Parameter(twin, requires_grad=False) if isinstance(tensor, nn.Parameter) else twin


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


def _explicit(exported: Any, traced: _Skeleton, paths: list[str], model: nn.Module) -> fx.GraphModule:
    """The exported graph with readable placeholder names, our records, and without the helper inputs."""
    kinds = torch.export.graph_signature.InputKind
    written = [s for s in exported.graph_signature.output_specs if s.kind.name != "USER_OUTPUT"]
    if written:
        raise CaptureError(
            f"{traced.model_name}: forward writes to {written[0].target or 'an input'}; a compiled module keeps no "
            "state between calls. Call model.eval(), or move that state into the inputs."
        )
    specs = list(exported.graph_signature.input_specs)
    users = [f"\0{name}" for name in traced.tokens] + paths
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    tokens: dict[fx.Node, str] = {}
    placeholders = [n for n in exported.graph.nodes if n.op == "placeholder"]
    ordered = sorted(zip(placeholders, specs), key=lambda pair: pair[1].kind != kinds.USER_INPUT)
    position = iter(users)
    tied = _tied(model)
    made: dict[str, fx.Node] = {}
    for node, given in ordered:
        if given.kind == kinds.USER_INPUT:
            key, kind = next(position), "input"
            if key.startswith("\0"):
                tokens[node] = key[1:]
                continue
        else:
            key, kind = _weight_key(given, exported, traced), "weight"
            key = tied.get(key, key)
            if key in made:
                env[node] = made[key]
                continue
        new = graph.placeholder(identifier(key))
        new.meta = {k: v for k, v in node.meta.items() if k in _KEPT_META}
        set_info(new, kind=kind, key=key)
        env[node] = made[key] = new
    env.update(_spell_tokens(graph, tokens, traced, [n for n in graph.nodes if info(n).kind == "input"]))
    for node in exported.graph.nodes:
        if node.op == "placeholder" or node in env:
            continue
        if node.target is argument:
            value, block, name = env[node.args[0]], *node.args[1:]
            set_info(value, arguments=(*info(value).arguments, (block, name)))
            continue
        if node.op == "get_attr":
            raise CaptureError(f"{traced.model_name}: control flow with its own subgraph ({node.target}) is not supported")
        env[node] = graph.node_copy(node, env.__getitem__)
        env[node].meta = {k: v for k, v in node.meta.items() if k in _KEPT_META}
    gm = fx.GraphModule({}, graph, class_name=type(model).__name__)
    gm.graph.eliminate_dead_code()
    return gm


_KEPT_META = {"val", "stack_trace", "nn_module_stack"}


def _tied(model: nn.Module) -> dict[str, str]:
    """For every further name of a parameter or buffer the one it goes by: the first outside a Linear, else the first.

    So a tensor is one input of the graph however often it is registered, and a Linear that shares the weight of an embedding
    can be quantised while the embedding keeps the tensor.
    """
    names: dict[int, list[tuple[bool, str]]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for leaf, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is not None:
                names.setdefault(id(tensor), []).append((isinstance(module, nn.Linear), f"{path}.{leaf}" if path else leaf))
    groups = [(min(group, key=lambda entry: entry[0])[1], group) for group in names.values() if len(group) > 1]
    return {name: key for key, group in groups for _, name in group if name != key}


def _weight_key(spec: Any, exported: Any, traced: _Skeleton) -> str:
    key = spec.target
    if spec.kind.name == "CONSTANT_TENSOR" and key not in traced.constants:
        value = exported.constants[key]
        known = next((path for path, tensor in _plain_tensors(traced.module) if tensor is value), None)
        if known in traced.constants:
            return known
        if value.is_meta or isinstance(value, FakeTensor):
            raise CaptureError(
                f"{traced.model_name}: forward makes a constant ({key}) on the device of its inputs in a way that cannot be "
                "traced; make it with torch.tensor, or register it as a buffer"
            )
        traced.constants[key] = value.detach()
    return key


def _spell_tokens(
    graph: fx.Graph, tokens: dict[fx.Node, str], traced: _Skeleton, inputs: list[fx.Node]
) -> dict[fx.Node, fx.Node]:
    """Say each helper input's size through the real inputs (`sample.size(2) // 4`); returns old size node -> new."""
    replaced: dict[fx.Node, fx.Node] = {}
    for token, name in tokens.items():
        node, index, factor = next(
            (node, i, int(dim.rpartition("*")[0]))
            for node, dims in zip(inputs, traced.dims or [])
            for i, dim in enumerate(dims)
            if dim is not None and dim.endswith(f"*{name}")
        )
        size = graph.call_function(torch.ops.aten.sym_size.int, (node, index))
        size.meta["val"] = node.meta["val"].shape[index]
        quotient = graph.call_function(operator.floordiv, (size, factor))
        quotient.meta["val"] = token.meta["val"].shape[0]
        for use in token.users:
            if use.target is not torch.ops.aten.sym_size.int:
                raise CaptureError(f"{traced.model_name}: {use} reads a helper input of the capture")
            replaced[use] = quotient
    return replaced


def _relocate(gm: fx.GraphModule, device: torch.device) -> None:
    """Move a graph traced on `meta` to the device it will run on: every device argument and every `val`."""

    def move(value: Any) -> Any:
        return device if isinstance(value, torch.device) and value.type == "meta" else value

    for node in gm.graph.nodes:
        node.args = pytree.tree_map(move, node.args)
        node.kwargs = pytree.tree_map(move, node.kwargs)
        for leaf in pytree.tree_leaves(node.meta.get("val")):
            if isinstance(leaf, torch.Tensor) and leaf.device.type == "meta":
                leaf.fake_device = device  # type: ignore[attr-defined]
    mode = fake_mode(gm)
    for node in gm.graph.nodes:
        if node.op == "call_function":
            # Some layouts depend on the device (attention on the CPU returns another stride order than on meta).
            val = infer(node.target, node.args, node.kwargs, mode)
            if "val" not in node.meta or spec(val) != spec(node.meta["val"]):  # decomposing drops some
                node.meta["val"] = val
    gm.recompile()
