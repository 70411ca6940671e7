"""backend="inductor": the same numbers within rounding, one program for each unique function, for all sizes, found again."""

from __future__ import annotations

import gc
import json
import operator
import os
import subprocess
import sys
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from backbones import backbone, calls
from compiled import family_slab
from laws import bits, l2
from models import Attend, Mlp, Norm, Residual, Seq, Spec, Staged, seeded, training
from torch import fx
from torch.torch_version import TorchVersion
from torch.utils._python_dispatch import TorchDispatchMode

import squareq_fx
from squareq_fx import CompiledModule, SquareQError, ops
from squareq_fx.edit import call as call_op
from squareq_fx.emit import emit
from squareq_fx.inference import empty
from squareq_fx.ir import fake_mode, functions
from squareq_fx.kernels import reference
from squareq_fx.kernels.dispatch import FUSED_MAX_ROWS
from squareq_fx.lowering import inductor
from squareq_fx.lowering.decompositions import decompose

SPEC = Spec(Seq((Residual(Seq((Norm(), Attend()))), Residual(Mlp(53)))), repeat=3, labels=True)
BUCKETS = ((2, 5, 3), (1, 9, 4), (3, 4, 4), (1, 1, 2))
FUNCTIONS = ["prologue", "block", "epilogue", "epilogue_vjp", "block_vjp", "prologue_vjp"]

aten = torch.ops.aten

pytestmark = pytest.mark.usefixtures("quick_compiler")


def staged() -> Staged:
    return training(SPEC, "recompute", ("x",), rank=4, alpha=8.0)


def made(backend: str, **options: Any) -> CompiledModule:
    models = staged()
    module = emit(models.graphs["schedule"], models.model, models.slab, backend=backend, **options)  # type: ignore[arg-type]
    with torch.no_grad(), seeded(3):
        for parameter in module.adapter_parameters().values():
            parameter.copy_(torch.randn(parameter.shape) * 0.1)
    return module


@pytest.fixture(scope="module")
def eager() -> CompiledModule:
    return made("eager")


@pytest.fixture(scope="module")
def shown() -> list[str]:
    return []


@pytest.fixture(scope="module")
def compiled(shown: list[str], quick_compiler: None) -> CompiledModule:
    return made("inductor", show=shown.append)


def output(module: CompiledModule, call: Mapping[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return module(**call)


def gradients(module: CompiledModule, call: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    x = call["x"].clone().requires_grad_()
    module(**{**call, "x": x}).square().mean().backward()
    found = {name: p.grad for name, p in module.adapter_parameters().items()} | {"x": x.grad}
    module.zero_grad(set_to_none=True)
    return {name: gradient for name, gradient in found.items() if gradient is not None}


# ------------------------------------------------------------------------------------------------------- what is compiled


def test_each_unique_function_is_compiled_once_and_in_advance(compiled: CompiledModule, shown: list[str]) -> None:
    assert [c.function for c in compiled.lowering.compilations] == FUNCTIONS
    assert shown == [f"inductor: {i} of 6 functions, now {name}" for i, name in enumerate(FUNCTIONS)]
    assert sum(node.op == "call_module" for node in compiled.graph.nodes) == 5, "three blocks share one function"


def test_all_sizes_run_the_same_programs(compiled: CompiledModule, eager: CompiledModule) -> None:
    for sizes in BUCKETS:
        call = SPEC.inputs(*sizes)
        assert l2(output(compiled, call), output(eager, call)) < 1e-5, sizes
        found, expected = gradients(compiled, call), gradients(eager, call)
        assert found.keys() == expected.keys()
        assert max(l2(found[name], expected[name]) for name in found if expected[name].any()) < 2e-5, sizes
    assert len(compiled.lowering.compilations) == len(FUNCTIONS)
    assert not any(c.fixed or c.condition for c in compiled.lowering.compilations)


def test_the_rank_is_a_size_too(compiled: CompiledModule, eager: CompiledModule) -> None:
    call = SPEC.inputs()
    try:
        for module in (compiled, eager):
            module.disable_lora()
        assert l2(output(compiled, call), output(eager, call)) < 1e-5
    finally:
        for module in (compiled, eager):
            module.enable_lora()
    assert len(compiled.lowering.compilations) == len(FUNCTIONS)


def test_the_graph_and_its_symbols_know_nothing_of_it(compiled: CompiledModule) -> None:
    env = fake_mode(compiled).shape_env
    before = len(env.guards), dict(env.replacements), dict(env.var_to_range)
    again = made("inductor")
    assert before == (len(env.guards), dict(env.replacements), dict(env.var_to_range))
    assert again.code == made("eager").code
    again.shutdown()


def test_streamed_and_resident_give_the_same_bits(compiled: CompiledModule) -> None:
    resident = made("inductor", backing="resident")
    for sizes in BUCKETS[:2]:
        call = SPEC.inputs(*sizes)
        assert bits(output(resident, call)) == bits(output(compiled, call))
        found, expected = gradients(resident, call), gradients(compiled, call)
        assert all(bits(found[name]) == bits(expected[name]) for name in expected)
    assert compiled.last_step is not None and compiled.last_step.bytes_to_device > 0
    resident.shutdown()


def test_under_a_dispatch_mode_the_graph_runs(compiled: CompiledModule, eager: CompiledModule) -> None:
    seen: set[Any] = set()

    class Seeing(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.add(func)
            return func(*args, **(kwargs or {}))

    call = SPEC.inputs()
    with Seeing():
        plain = output(compiled, call)
    assert ops.int8_linear in seen
    assert bits(plain) == bits(output(eager, call))


def test_an_edited_function_is_compiled_again() -> None:
    module, call = made("inductor"), SPEC.inputs()
    before, expected = len(module.lowering.compilations), output(module, call)
    function = functions(module)["epilogue"]
    result = next(n for n in function.graph.nodes if n.op == "output")
    (value,) = result.all_input_nodes
    with function.graph.inserting_before(result):
        doubled = function.graph.call_function(aten.mul.Tensor, (value, 2))
    result.args = (doubled,)
    function.recompile()
    assert l2(output(module, call), expected * 2) < 1e-6
    assert [c.function for c in module.lowering.compilations[before:]] == ["epilogue"]
    module.shutdown()


# ---------------------------------------------------------------------------------------------- functions that are different


def function_of(body: Any, *values: Any) -> fx.GraphModule:
    """A function of the graph's world, made by `body(graph, *placeholders)`."""
    graph = fx.Graph()
    inputs = []
    for i, value in enumerate(values):
        inputs.append(graph.placeholder(f"x{i}"))
        inputs[-1].meta["val"] = value
    graph.output(body(graph, *inputs))
    return fx.GraphModule({}, graph)


def sizes() -> tuple[Any, torch.SymInt, torch.SymInt]:
    """The graph's fake tensor mode, and two sizes of its world."""
    block = functions(staged().graphs["stream"])["block"]
    inputs = [n.meta["val"] for n in block.graph.nodes if n.op == "placeholder"]
    value = next(v for v in inputs if v.dim() == 3)
    return value.fake_mode, value.shape[0], value.shape[1]


def test_a_size_may_be_a_product_of_which_no_input_tells_the_factors() -> None:
    mode, rows, columns = sizes()
    noted: list[inductor.Compilation] = []

    def body(graph: fx.Graph, x: fx.Node) -> fx.Node:
        return call_op(graph, aten.sin.default, (call_op(graph, aten.view.default, (x, [-1, 4]), like=x),), like=x)

    value = empty(mode, (rows * columns * 4,), torch.float32, torch.device("cpu"))
    run = inductor.compile_function("four", function_of(body, value), noted.append)
    for size in (8, 40, 12):
        x = torch.randn(size)
        assert torch.allclose(run(x), x.view(-1, 4).sin())
    assert len(noted) == 1 and noted[0].sizes == (int(rows.node.hint) * int(columns.node.hint) * 4,)


def test_sizes_that_a_program_does_not_hold_for_are_compiled_for(monkeypatch: pytest.MonkeyPatch) -> None:
    original, noted = inductor._compiled, []

    def assuming(body: fx.Graph, world: Any) -> Any:
        assert world.sizes[0] < 6 or world.sizes[0] == 7 or world.sizes[0] > 7  # each of the three is a condition
        return original(body, world)

    monkeypatch.setattr(inductor, "_compiled", assuming)
    mode, rows, _ = sizes()

    def body(graph: fx.Graph, x: fx.Node) -> fx.Node:
        return call_op(graph, aten.cos.default, (x,), like=x)

    value = empty(mode, (rows,), torch.float32, torch.device("cpu"))
    run = inductor.compile_function("cos", function_of(body, value), noted.append)
    assert noted[0].sizes[0] == rows.node.hint < 6 and "<= 5" in noted[0].condition
    for size, programs in ((1, 1), (3, 1), (7, 2), (4, 2), (7, 2), (8, 3), (900, 3)):
        x = torch.randn(size)
        assert torch.allclose(run(x), x.cos())
        assert len(noted) == programs, size
    assert [c.fixed for c in noted] == [(), (0,), ()]


def test_inputs_that_are_sizes_views_and_outputs_that_are_inputs() -> None:
    mode, rows, columns = sizes()
    device = torch.device("cpu")

    def body(graph: fx.Graph, x: fx.Node, n: fx.Node) -> tuple[fx.Node, ...]:
        flat = call_op(graph, aten.view.default, (x, [n]), like=x)
        return x, call_op(graph, aten.exp.default, (flat,), like=x), n, call_op(graph, aten.t.default, (x,), like=x)

    values = empty(mode, (rows, columns), torch.float32, device), rows * columns
    noted: list[inductor.Compilation] = []
    run = inductor.compile_function("mixed", function_of(body, *values), noted.append)
    for shape in ((2, 3), (5, 4)):
        x = torch.randn(shape)
        same, flat, count, turned = run(x, x.numel())
        assert same.data_ptr() == x.data_ptr() and turned.data_ptr() == x.data_ptr() and turned.shape == shape[::-1]
        assert count == x.numel() and torch.allclose(flat, x.exp().view(-1))
    assert len(noted) == 1
    misaligned = torch.randn(7)[1:].view(2, 3)
    assert torch.allclose(run(misaligned, 6)[1], misaligned.exp().view(-1))


def test_weights_are_unpacked_outside_and_not_kept() -> None:
    mode, rows, _ = sizes()

    def body(graph: fx.Graph, weights: fx.Node, x: fx.Node) -> fx.Node:
        scale = call_op(graph, ops.unpack, (weights, 4, [3], torch.float32), like=x)
        steps = call_op(graph, ops.unpack, (weights, 1, [3], torch.int8), like=x)
        moved = call_op(graph, aten.add.Tensor, (x, steps), like=x)
        return call_op(graph, aten.mul.Tensor, (moved, scale), like=x)

    device = torch.device("cpu")
    values = empty(mode, (16,), torch.uint8, device), empty(mode, (rows, 3), torch.float32, device)
    run = inductor.compile_function("scaled", function_of(body, *values), lambda _: None)
    for start in (0, 4):  # the second lies at no multiple of 16
        weights = torch.randint(0, 100, (32,), dtype=torch.uint8)[start : start + 16]
        weights[4:16].view(torch.float32).copy_(torch.randn(3))
        x, alive = torch.randn(4, 3), weakref.ref(weights)
        expected = (x + weights[1:4].view(torch.int8)) * weights[4:16].view(torch.float32)
        assert torch.allclose(run(weights, x), expected)
        del weights
        gc.collect()
        assert alive() is None


def test_w8a8_quantises_inside_and_multiplies_by_our_kernel() -> None:
    mode, rows, columns = sizes()
    weights = _quantised(3, 24, 40)

    def body(graph: fx.Graph, x: fx.Node, *layer: fx.Node) -> fx.Node:
        norm = call_op(graph, aten.layer_norm.default, (x, [40]), like=x)
        both = call_op(graph, ops.quantize_rows, (norm,), like=x)
        xq, sx = (call_op(graph, operator.getitem, (both, i), like=x) for i in range(2))
        product = call_op(graph, ops.int8_matmul, (xq, sx, *layer, torch.float32, "silu"), like=x)
        return call_op(graph, aten.mul.Tensor, (product, 2.0), like=x)

    shapes = [((rows, columns, 40), torch.float32), *((tuple(w.shape), w.dtype) for w in weights)]
    function = function_of(body, *(empty(mode, shape, dtype, torch.device("cpu")) for shape, dtype in shapes))
    run = inductor.compile_function("w8a8", function, lambda _: None)
    for shape in ((2, 5, 40), (1, 7, 40)):
        x = torch.randn(shape)
        assert l2(run(x, *weights), function(x, *weights)) < 1e-3, "a rounding to int8 may go the other way"


def test_a_function_that_computes_nothing_is_not_compiled() -> None:
    mode, rows, _ = sizes()

    def body(graph: fx.Graph, x: fx.Node) -> fx.Node:
        return call_op(graph, aten.t.default, (x,), like=x)

    value = empty(mode, (rows, 3), torch.float32, torch.device("cpu"))
    run = inductor.compile_function("turn", function_of(body, value), print)
    assert run(torch.ones(2, 3)).shape == (3, 2)
    assert not isinstance(run, inductor.CompiledFunction)


# ------------------------------------------------------------------------------------------------------------ decompositions


def _quantised(seed: int, rows: int, width: int, zero: float = 0.0) -> tuple[torch.Tensor, ...]:
    with seeded(seed):
        q, scale, zero_point = reference.quantize_weight(torch.randn(rows, width))
        return q, scale, zero_point + zero, torch.randn(rows)


def _decomposed(operation: Any, *arguments: Any) -> tuple[Any, set[Any]]:
    """What the operation's decomposition gives for these arguments, and the operations in it."""
    graph = fx.Graph()
    nodes = []
    for i, argument in enumerate(arguments):
        if isinstance(argument, torch.Tensor):
            nodes.append(graph.placeholder(f"x{i}"))
            nodes[-1].meta["val"] = argument
        else:
            nodes.append(argument)
    node = graph.call_function(operation, tuple(nodes))
    node.meta["val"] = operation(*arguments)
    if isinstance(node.meta["val"], tuple):
        items = [graph.call_function(operator.getitem, (node, i)) for i in range(len(node.meta["val"]))]
        for item, value in zip(items, node.meta["val"]):
            item.meta["val"] = value
        graph.output(tuple(items))
    else:
        graph.output(node)
    decompose(graph)
    gm = fx.GraphModule({}, graph)
    given = [a for a in arguments if isinstance(a, torch.Tensor)]
    return gm(*given), {n.target for n in graph.nodes if n.op == "call_function"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("zero", [0.0, 3.0])
def test_w8a16_with_many_rows_is_a_dequantised_weight_and_a_product(dtype: torch.dtype, zero: float) -> None:
    q, scale, zero_point, bias = _quantised(0, 12, 40, zero)
    limit = 1e-5 if dtype == torch.float32 else 1e-2
    with seeded(1):
        many, few = torch.randn(3, 50, 40).to(dtype), torch.randn(1, 40).to(dtype)
    for own in (bias, None):
        found, used = _decomposed(ops.int8_linear, many, q, scale, zero_point, own)
        assert l2(found, reference.int8_linear(many, q, scale, zero_point, own)) < limit
        assert found.dtype == dtype and ops.int8_linear not in used and aten.linear.default in used
    found, used = _decomposed(ops.int8_linear_dx, many[..., :12], q, scale, zero_point, 40)
    assert l2(found, reference.int8_linear_dx(many[..., :12], q, scale, zero_point, 40)) < limit
    assert ops.int8_linear_dx not in used
    assert ops.int8_linear in _decomposed(ops.int8_linear, many, q, scale, zero_point, bias, "w8a8")[1]
    assert len(few) <= FUSED_MAX_ROWS[dtype] < 150
    assert ops.int8_linear in _decomposed(ops.int8_linear, few, q, scale, zero_point, bias)[1]


def test_parts_are_products_with_slices_of_one_weight() -> None:
    q, scale, zero_point, bias = _quantised(0, 12, 40)
    with seeded(1):
        x = torch.randn(2, 9, 40)
    found, used = _decomposed(ops.int8_linear_parts, x, q, scale, zero_point, bias, 3)
    assert torch.allclose(found, ops.int8_linear_parts(x, q, scale, zero_point, bias, 3), atol=1e-5)
    assert aten.stack.default in used
    graph = fx.Graph()
    nodes = [graph.placeholder(name) for name in "xqszb"]
    for node, value in zip(nodes, (x, q, scale, zero_point, bias)):
        node.meta["val"] = value
    parts = graph.call_function(ops.int8_linear_parts, (*nodes, 3))
    parts.meta["val"] = found
    picked = [graph.call_function(aten.select.int, (parts, 0, i)) for i in (2, 0)]
    for node, i in zip(picked, (2, 0)):
        node.meta["val"] = found[i]
    graph.output(tuple(picked))
    decompose(graph)
    assert not graph.find_nodes(op="call_function", target=aten.stack.default)
    assert not graph.find_nodes(op="call_function", target=aten.select.int)
    results = fx.GraphModule({}, graph)(x, q, scale, zero_point, bias)
    assert torch.allclose(results[0], found[2], atol=1e-5) and torch.allclose(results[1], found[0], atol=1e-5)


def test_quantised_rows_are_what_the_kernel_gives() -> None:
    with seeded(2):
        x = torch.randn(2, 7, 33) * torch.logspace(-3, 3, 7)[:, None]
    x[0, 0] = 0
    (xq, sx), used = _decomposed(ops.quantize_rows, x)
    expected, scales = reference.quantize_rows(x)
    assert ops.quantize_rows not in used
    assert torch.allclose(sx[..., 0], scales[..., 0], rtol=1e-6) and xq.dtype == torch.int8 and sx[0, 0].tolist() == [1, 0]
    assert torch.equal(sx[..., 1], xq.sum(-1, dtype=torch.int32).float()) and sx.dtype == torch.float32
    assert (xq.int() - expected.int()).abs().max() <= 1 and (xq != expected).float().mean() < 0.01


@pytest.mark.parametrize("joins", [False, True])
def test_two_that_lie_in_memory_are_left_to_our_kernel(joins: bool) -> None:
    with seeded(3):
        x, beside = torch.randn(2, 3, 16), torch.randn(2, 3, 8)
    if not joins:
        found, used = _decomposed(ops.quantize_rows, x, beside)
        assert ops.quantize_rows in used and aten.cat.default not in used
    else:
        graph = fx.Graph()
        nodes = [graph.placeholder(name) for name in "xb"]
        gelu = graph.call_function(aten.gelu.default, (nodes[1],))
        rows = graph.call_function(ops.quantize_rows, (nodes[0], gelu))
        for node, value in zip((*nodes, gelu), (x, beside, torch.nn.functional.gelu(beside))):
            node.meta["val"] = value
        items = [graph.call_function(operator.getitem, (rows, i)) for i in range(2)]
        for item, value in zip(items, reference.quantize_rows(x, beside)):
            item.meta["val"] = value
        graph.output(tuple(items))
        decompose(graph)
        assert not graph.find_nodes(op="call_function", target=ops.quantize_rows)
        beside, found = torch.nn.functional.gelu(beside), fx.GraphModule({}, graph)(x, beside)
    for got, wanted in zip(found, reference.quantize_rows(x, beside)):
        assert torch.allclose(got.float(), wanted.float(), rtol=1e-6, atol=1.0 if joins and got.dtype == torch.int8 else 0)


# ------------------------------------------------------------------------------------------------------------ errors, caching


def test_an_unknown_backend_is_refused_before_any_work() -> None:
    models = staged()
    with pytest.raises(SquareQError, match="backend='tvm' is none of eager, inductor, cudagraph, eager.cudagraph"):
        squareq_fx.compile(models.model, "no such slab", backend="tvm")  # type: ignore[arg-type]
    with pytest.raises(SquareQError, match="cannot run on cpu"):
        squareq_fx.compile(models.model, "no such slab", backend="cudagraph", device="cpu")
    with pytest.raises(SquareQError, match=r'backend="eager\+cudagraph" records graphs of a CUDA device'):
        squareq_fx.compile(models.model, "no such slab", backend="eager+cudagraph", device="cpu")
    with pytest.raises(SquareQError, match="this one is quantized; go on to the pass stream"):
        emit(models.graphs["adapt"], models.model, models.slab, backend="inductor")


def test_a_refusal_names_the_function_and_the_source(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Any:
        raise NotImplementedError("aten.gelu.default: no lowering")

    monkeypatch.setattr(inductor, "_compiled", broken)
    with pytest.raises(SquareQError) as caught:
        made("inductor")
    text = str(caught.value)
    assert "Inductor cannot compile the function prologue: NotImplementedError" in text
    assert "model source: " in text and "models.py" in text and 'backend="eager"' in text
    assert "raised in " in text and "test_inductor.py" in text and "(broken: raise NotImplementedError(" in text


def test_programs_are_tuned_for_the_sizes_that_are_given_and_hold_for_all() -> None:
    mode, rows, columns = sizes()
    noted: list[inductor.Compilation] = []

    def body(graph: fx.Graph, x: fx.Node) -> fx.Node:
        return call_op(graph, aten.sin.default, (x,), like=x)

    def usual(size: torch.SymInt) -> int:
        return {str(rows.node.expr): 1}[str(size.node.expr)]  # nothing is known of the columns

    value = empty(mode, (rows, columns), torch.float32, torch.device("cpu"))
    run = inductor.compile_function("sin", function_of(body, value), noted.append, usual)
    assert noted[0].sizes == (2, columns.node.hint), "what is tuned for one sample must hold for several"
    for shape in ((1, 1), (1, 7), (5, 2)):
        x = torch.randn(shape)
        assert torch.allclose(run(x), x.sin())
    assert len(noted) == 1


def test_many_rows_are_those_that_will_be_run() -> None:
    q, scale, zero_point, bias = _quantised(0, 12, 40)
    mode, rows, _ = sizes()
    for opened in (True, False):
        graph = fx.Graph()
        nodes = [graph.placeholder(name) for name in "xqszb"]
        x = empty(mode, (rows, 40), torch.float32, torch.device("cpu"))
        for node, value in zip(nodes, (x, q, scale, zero_point, bias)):
            node.meta["val"] = value
        graph.output(call_op(graph, ops.int8_linear, tuple(nodes), like=nodes[0]))
        decompose(graph, {True: lambda size: 4096, False: lambda size: 2}[opened])
        assert bool(graph.find_nodes(op="call_function", target=aten.linear.default)) is opened


def test_compile_tunes_for_the_example_inputs_sizes() -> None:
    model, slab = backbone("dit"), family_slab("dit")
    example = calls("dit", 5)
    module = squareq_fx.compile(model, slab, example_inputs=example, backend="inductor", progress=False)
    assert {c.sizes for c in module.lowering.compilations} == {(5,)}
    usual = squareq_fx.compile(model, slab, backend="inductor", progress=False)
    assert {c.sizes for c in usual.lowering.compilations} == {(2,)}, "usual is one sample; programs are for several too"


@pytest.mark.skipif(torch.__version__ < TorchVersion("2.13"), reason="older C++ programs of Inductor drop the rounding")
def test_16_bit_values_round_between_fused_operations() -> None:
    mode, rows, _ = sizes()

    def body(graph: fx.Graph, x: fx.Node) -> fx.Node:
        large = call_op(graph, aten.mul.Tensor, (x, 1000), like=x)
        moved = call_op(graph, aten.add.Tensor, (large, 3.3), like=x)
        return call_op(graph, aten.sub.Tensor, (moved, large), like=x)

    function = function_of(body, empty(mode, (rows, 64), torch.bfloat16, torch.device("cpu")))
    run = inductor.compile_function("scaled", function, lambda _: None)
    with seeded(4):
        x = torch.randn(4, 64).to(torch.bfloat16)
    assert torch.equal(run(x), function(x))


def test_a_whole_w8a8_model_agrees_with_its_operations() -> None:
    model, slab = backbone("flux"), family_slab("flux")
    eager, compiled = (
        squareq_fx.compile(model, slab, compute="w8a8", backend=backend, progress=False)  # type: ignore[arg-type]
        for backend in ("eager", "inductor")
    )
    programs = len(compiled.lowering.compilations)
    for n in (2, 1, 3):
        call = calls("flux", n)
        with torch.no_grad():
            found, expected = compiled(**call).sample, eager(**call).sample
        assert l2(found, expected) < 1e-2, "a rounding to int8 may go the other way"
    assert len(compiled.lowering.compilations) == programs


_SECOND = """
import json, sys
import test_inductor
from torch._dynamo.utils import counters
from torch._inductor import config

config.cpp.simdlen, config.compile_threads = 1, 1
module = test_inductor.made("inductor")
counted = {name: counters["inductor"][name] for name in ("fxgraph_cache_hit", "fxgraph_cache_miss")}
print(json.dumps([counted, sum(c.seconds for c in module.lowering.compilations)]))
"""


def test_a_second_process_finds_the_programs(compiled: CompiledModule) -> None:
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    environment = os.environ | {"PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", _SECOND], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    counted, seconds = json.loads(done.stdout.splitlines()[-1])
    first = sum(c.seconds for c in compiled.lowering.compilations)
    print(f"{len(FUNCTIONS)} functions: {first:.1f} s compiled, {seconds:.1f} s from the cache")
    assert counted == {"fxgraph_cache_hit": len(FUNCTIONS), "fxgraph_cache_miss": 0}


@pytest.mark.parametrize(
    ("hint", "width", "expected"),
    [
        ("INNER", 3072, True),
        ("DEFAULT", 15360, True),  # behind a `cat`
        ("DEFAULT", 128, None),
        ("INNER", 16385, None),
        ("OUTER", 3072, None),
        ("INNER", "s0", None),
    ],
)
def test_long_rows_of_known_width_are_reduced_in_registers(
    hint: str, width: Any, expected: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """None: what Inductor's own rule says, whichever that is."""
    import sympy
    from torch._inductor.choices import InductorChoices
    from torch._inductor.runtime.hints import ReductionHint

    from squareq_fx.lowering.inductor_choices import RowsInRegisters

    class Features:
        reduction_numel = sympy.sympify(width)

        def get_reduction_hint(self) -> ReductionHint:
            return ReductionHint[hint]

    for usual in (False, True):
        monkeypatch.setattr(InductorChoices, "should_use_persistent_reduction", staticmethod(lambda *a, usual=usual: usual))
        assert RowsInRegisters.should_use_persistent_reduction(Features(), False) is (usual if expected is None else expected)
        assert RowsInRegisters.should_use_persistent_reduction(Features(), True) is usual
