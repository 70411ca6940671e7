"""The vector-Jacobian product of one function of the graph, found by tracing torch's own autograd through it.

Traced on the graph's own fake tensors, so sizes stay symbols and the result holds for every size. Sources: reverse mode as in
JAX's `vjp` (arXiv 2105.09469); tracing by `torch.fx.experimental.proxy_tensor.make_fx`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._decomp import get_decompositions
from torch._dispatch.python import enable_python_dispatcher
from torch.fx import traceback
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree

from squareq_fx import ops
from squareq_fx.errors import PassError
from squareq_fx.gradients.activity import has_floats, is_valueless, output_nodes, value_arguments
from squareq_fx.inference import infer
from squareq_fx.ir import fake_mode, identifier, info, model_source, operation_name, set_info
from squareq_fx.liveness import aliased_arguments

__all__ = ["Traced", "fresh", "gradients_of", "trace_vjp", "tracing"]

# cuDNN's attention is left out: its backward dies with an illegal memory access on the transposed layouts diffusers makes.
_ATTENTION = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


@dataclass(frozen=True)
class Traced:
    """A function together with its gradients, one flat graph.

    Attributes:
        graph: placeholders are the function's inputs, then one cotangent for each differentiated output; it returns the
            function's outputs, then one gradient for each entry of `gradients`.
        inputs, cotangents, outputs, gradients: those nodes; a gradient is None where the outputs do not depend on the input.
    """

    graph: fx.Graph
    inputs: tuple[fx.Node, ...]
    cotangents: tuple[fx.Node, ...]
    outputs: tuple[fx.Node, ...]
    gradients: tuple[fx.Node | None, ...]


def trace_vjp(function: fx.GraphModule, wrt: tuple[int, ...], outputs: tuple[int, ...], made_by: str) -> Traced:
    """Trace `function` and the gradients of its outputs, given their cotangents, by some of its inputs.

    Args:
        function: a function of the graph; unchanged.
        wrt: positions of the floating point inputs to differentiate by.
        outputs: positions of the outputs a cotangent is given for; they must depend on the inputs `wrt`.
        made_by: the pass, for the new nodes' records.

    Raises:
        PassError: an operation on the way has no derivative and would cut the gradient.
    """
    placeholders = [n for n in function.graph.nodes if n.op == "placeholder"]
    sources = list(function.graph.nodes)
    results = output_nodes(function)
    mode = fake_mode(function)
    with mode, torch.no_grad():
        # The tracer tells tensors apart by identity, and equal types share one `val`.
        arguments = [fresh(n.meta["val"]) for n in placeholders]
        tangents = [torch.empty_like(results[i].meta["val"], memory_format=torch.contiguous_format) for i in outputs]

    def joint(*flat: Any) -> tuple[list[Any], list[Any]]:
        given, cotangents = list(flat[: len(arguments)]), list(flat[len(arguments) :])
        for i in wrt:
            given[i] = given[i].detach().requires_grad_()
        with torch.enable_grad():
            values = _Recording(function, sources).run(*given)
            values = [values] if isinstance(values, torch.Tensor) else list(values)
            try:
                gradients = gradients_of([values[i] for i in outputs], [given[i] for i in wrt], cotangents)
            except PassError as error:
                at = sources[(traceback.get_current_meta().get("custom") or {}).get(_SOURCE, -1)]
                raise PassError(f"{at.target} ({at.name}): {error}\n  model source: {model_source(at)}") from error
        return values, list(gradients)

    with tracing(mode):
        trace = make_fx(joint, _decompositions(tangents[0].device), tracing_mode="real", _allow_non_fake_inputs=True)
        traced = trace(*arguments, *tangents)
    return _cleaned(traced, function, len(arguments), len(results), made_by, sources)


def gradients_of(outputs: list[Any], inputs: list[Any], cotangents: list[Any] | None) -> tuple[Any, ...]:
    """`torch.autograd.grad`, None where there is no dependence; PassError if torch has no derivative for an operation."""
    try:
        return torch.autograd.grad(outputs, inputs, cotangents, allow_unused=True)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0]
        raise PassError(
            f"torch cannot differentiate an operation of this function: {reason}. Detach its input in the model, or register a "
            "derivative with torch.library.register_autograd."
        ) from error


def fresh(val: Any) -> Any:
    """A tensor of the type of `val` that no other value is."""
    if not isinstance(val, torch.Tensor):
        return val
    return torch.empty_strided(val.shape, val.stride(), dtype=val.dtype, device=val.device)


def _decompositions(device: torch.device) -> dict[Any, Any]:
    """Operations that autograd uses on fake tensors of every device, and that exist on CUDA only."""
    fused = (torch.ops.aten._fused_rms_norm.default, torch.ops.aten._fused_rms_norm_backward.default)
    return {} if device.type == "cuda" else get_decompositions(fused)


@contextlib.contextmanager
def tracing(mode: Any) -> Iterator[None]:
    """Sizes stay symbols, no condition is put on them, and the backward runs on this thread, where the tracer sees it."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(mode)
        stack.enter_context(enable_python_dispatcher())
        stack.enter_context(mode.shape_env.suppress_guards())
        stack.enter_context(torch.autograd.set_multithreading_enabled(False))
        stack.enter_context(traceback.preserve_node_meta())
        stack.enter_context(sdpa_kernel(_ATTENTION))
        yield


class _Int8Linear(torch.autograd.Function):
    """While tracing only: it is what tells autograd that the gradient of an int8 layer is `int8_linear_dx`."""

    @staticmethod
    def forward(ctx: Any, x: Any, qweight: Any, scale: Any, zero_point: Any, bias: Any, *compute: str) -> Any:
        ctx.save_for_backward(qweight, scale, zero_point)
        ctx.in_features, ctx.arguments = x.shape[-1], 5 + len(compute)
        return ops.int8_linear(x, qweight, scale, zero_point, bias, *compute)

    @staticmethod
    def backward(ctx: Any, *dy: Any) -> Any:
        return ops.int8_linear_dx(dy[0], *ctx.saved_tensors, ctx.in_features), *([None] * (ctx.arguments - 1))


class _Recording(fx.Interpreter):
    """Runs a function so that every traced node, of the backward too, says which node of the function it came from."""

    def __init__(self, function: fx.GraphModule, sources: list[fx.Node]) -> None:
        super().__init__(function)
        self.extra_traceback = False  # it would be appended to our own errors
        self._index = {node: i for i, node in enumerate(sources)}

    def run_node(self, n: fx.Node) -> Any:
        if n.op != "call_function":
            return super().run_node(n)
        with self._set_current_node(n):
            args, kwargs = self.fetch_args_kwargs_from_env(n)
            _mark(self._index[n])
            if n.target is ops.int8_linear:
                result = _Int8Linear.apply(*args, *([None] * (5 - len(args))))
            elif n.target is torch.ops.aten.copy.default:  # what functionalising makes of writes; it has no derivative
                result = args[1].to(args[0].dtype).expand(args[0].shape)
            else:
                result = n.target(*args, **kwargs)  # type: ignore[operator]
        tensors = [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        for tensor in tensors:
            if tensor.grad_fn is not None:
                tensor.grad_fn.register_prehook(lambda _, index=self._index[n]: _mark(index))
        self._check(n, tensors)
        return result

    def _check(self, node: fx.Node, results: list[torch.Tensor]) -> None:
        if is_valueless(node) or any(t.requires_grad and not _gives_nothing(t) for t in results):
            return
        reads = [self.env[a] for a in value_arguments(node)]
        needs = any(isinstance(leaf, torch.Tensor) and leaf.requires_grad for leaf in pytree.tree_leaves(reads))
        if needs and has_floats(results):
            raise PassError(
                f"{node.target} ({node.name}) would cut the gradient: an input needs one and the operation has none to give. "
                "Register one with torch.library.register_autograd, or detach its input in the model.\n"
                f"  model source: {model_source(node)}"
            )


def _gives_nothing(t: torch.Tensor) -> bool:
    """torch's fallback for an operation without a derivative: its backward warns and passes nothing on."""
    return t.grad_fn is not None and t.grad_fn.name().endswith("Implemented")


_SOURCE = "squareq_source"


def _mark(index: int) -> None:
    """What the tracer makes from now on belongs to this node of the function."""
    traceback.get_current_meta()["custom"] = {_SOURCE: index}


def _cleaned(
    traced: fx.GraphModule, function: fx.GraphModule, inputs: int, outputs: int, made_by: str, sources: list[fx.Node]
) -> Traced:
    """The trace as a graph of ours: functional, without aliases and repetitions, every node with its type and its source."""
    graph = fx.Graph()
    mode = fake_mode(function)
    env: dict[fx.Node, Any] = {}
    seen: dict[tuple[Any, ...], fx.Node] = {}
    originals = [n for n in function.graph.nodes if n.op == "placeholder"]
    placeholders: list[fx.Node] = []
    for node in traced.graph.nodes:
        if node.op == "placeholder":
            position = len(placeholders)
            original = originals[position] if position < inputs else None
            new = graph.placeholder(original.target if original is not None else f"d_output_{position - inputs}")  # type: ignore[arg-type]
            new.meta["val"] = original.meta["val"] if original is not None else node.meta["val"]
            if original is not None:
                new.meta["squareq"] = info(original)
            env[node] = set_info(new, kind=info(new).kind if original is not None else "input", made_by=made_by)
            placeholders.append(new)
        elif node.op == "output":
            values, gradients = node.args[0]  # type: ignore[misc]
            found = tuple(env[v] for v in values), tuple(env[g] if isinstance(g, fx.Node) else None for g in gradients)
            return Traced(graph, tuple(placeholders[:inputs]), tuple(placeholders[inputs:]), *found)
        elif node.op != "call_function":
            raise PassError(
                f"the gradient of {function._get_name()} needs the constant {node.target}, which no input of it holds; make it "
                "with torch.tensor in the model's forward, or register it as a buffer"
            )
        elif node.target in _ALIASES:
            env[node] = env[node.args[0]]
        else:
            env[node] = _copied(graph, node, env, seen, mode, made_by, sources)
    raise AssertionError("a trace without output")


_ALIASES = {torch.ops.aten.detach.default, torch.ops.aten.alias.default}


def _copied(
    graph: fx.Graph,
    node: fx.Node,
    env: dict[fx.Node, Any],
    seen: dict[tuple[Any, ...], fx.Node],
    mode: Any,
    made_by: str,
    sources: list[fx.Node],
) -> fx.Node:
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), env.__getitem__)
    target = node.target
    if isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable:
        target = _out_of_place(node)
    if target is torch.ops.aten.view.default:
        # Whether it can be one was decided by strides that fake tensors foretold, and kernels give others now and then: torch
        # 2.14's group norm backward, in half precision on a CPU. Then this copies, where a view would fail.
        target = torch.ops.aten.reshape.default
    key = (target, str(args), str(kwargs))
    if key in seen:
        return _written(node, seen[key], env)
    source = sources[(node.meta.get("custom") or {}).get(_SOURCE, 0)]
    layer = info(source).layer
    name = operation_name(target)
    if layer is not None:
        name = identifier(source.name) + ("" if target is source.target else f"_{name.removeprefix('int8_linear_')}")
    new = graph.create_node("call_function", target, args, kwargs, name=name)
    for field in ("stack_trace", "nn_module_stack"):
        if field in source.meta:
            new.meta[field] = source.meta[field]
    new.meta["val"] = infer(target, args, kwargs, mode)  # type: ignore[arg-type]
    set_info(new, made_by=made_by, layer=layer)
    seen[key] = new
    return _written(node, new, env)


def _out_of_place(node: fx.Node) -> Any:
    """The form of an operation that writes to its first argument which returns the result instead.

    torch's own composites write to temporaries. One that is, or has, a view could be read under another name: that is refused.
    """
    target: Any = node.target
    written = [a for a in target._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    own = node.args[0]
    name = target._opname.removesuffix("_")
    packet = getattr(getattr(torch.ops, target.namespace), name, None)
    functional = getattr(packet, target._overloadname, None)
    assert isinstance(own, fx.Node)
    views = aliased_arguments(own) or any(own in aliased_arguments(reader) for reader in _readers(own, node))
    if functional is None or len(written) != 1 or written[0] is not target._schema.arguments[0] or views:
        raise PassError(f"the gradient of {model_source(node)} needs {target}, which writes to a value that others may read")
    return functional


def _readers(written: fx.Node, by: fx.Node) -> list[fx.Node]:
    return [u for u in written.users if u is not by and u.op == "call_function" and not u.target._schema.is_mutable]  # type: ignore[union-attr]


def _written(node: fx.Node, new: fx.Node, env: dict[fx.Node, Any]) -> fx.Node:
    """After an operation that writes to its argument, that argument's name means the result."""
    if isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable:
        env[node.args[0]] = new  # type: ignore[index]
    return new
