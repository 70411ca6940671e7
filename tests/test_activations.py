"""activations: a layer that computes in w8a8 becomes its row quantisation and its int8 product."""

from __future__ import annotations

import functools
import operator
from typing import Any

import laws
import pytest
import torch
from gradients import adapters_for, by_graph, cotangents_for
from hypothesis import example, given
from hypothesis import strategies as st
from models import EXAMPLES, SIZES, Function, Mlp, Residual, Spec, Staged, few, make_slab, specs, staged, training
from torch import fx, nn

import squareq_fx
from squareq_fx import ops
from squareq_fx.emit import emit
from squareq_fx.errors import PassError, VerificationError
from squareq_fx.ir import Level, clone, functions, info, program, update_program
from squareq_fx.kernels import dispatch
from squareq_fx.passes import Activations, Canonicalize, Quantize


@functools.cache
def in_w8a8(spec: Spec) -> Staged:
    """`staged` with every layer in w8a8."""
    models = staged(spec)
    final = squareq_fx.run(models.graphs["capture"], squareq_fx.default_passes(models.slab, compute="w8a8"))
    graphs = {stage.name: stage.graph for stage in program(final).history}
    return Staged(models.model, models.slab, graphs, models.dequantized)


def nodes(gm: fx.GraphModule, target: Any) -> list[fx.Node]:
    return [n for graph in (gm, *functions(gm).values()) for n in graph.graph.nodes if n.target is target]


@few
@given(specs())
@example(EXAMPLES[0])
@example(EXAMPLES[1])
@example(EXAMPLES[2])
@example(EXAMPLES[3])
def test_laws(spec: Spec) -> None:
    models = in_w8a8(spec)
    before = models.graphs["stream"]
    after = laws.apply(Activations(), before, models)
    assert program(after) == program(before)
    assert nodes(after, ops.int8_linear) == []
    assert len(nodes(after, ops.int8_matmul)) == len(nodes(after, ops.quantize_rows)) == len(nodes(before, ops.int8_linear))
    for sizes in SIZES:
        call = spec.inputs(*sizes)
        found = laws.evaluate(after, models, call)
        assert laws.same(found, laws.evaluate(before, models, call))
        assert laws.same(laws.printed(after, models, call), found)


@few
@given(specs())
@example(EXAMPLES[2])
def test_every_product_is_the_layer_s_bit_for_bit(spec: Spec) -> None:
    """Against the operation with `compute="w8a8"` on what the product is given; and the flat graph obeys the laws too."""
    models = in_w8a8(spec)
    flat = laws.apply(Activations(), models.graphs["quantize"], models)
    inputs: dict[fx.Node, torch.Tensor] = {}
    checked = []

    def observe(node: fx.Node, args: Any, result: Any) -> None:
        if node.target is ops.quantize_rows:
            inputs[node] = args[0]
        elif node.target is ops.int8_matmul:
            x = inputs[node.args[0].args[0]]  # type: ignore[union-attr, index]
            assert laws.same([result], [dispatch.int8_linear(x, *args[2:6], "w8a8")])
            assert torch.isfinite(result).all() and result.dtype == x.dtype
            checked.append(node)

    laws.evaluate(flat, models, spec.inputs(), observe=observe)
    assert len(checked) == len(nodes(models.graphs["quantize"], ops.int8_linear))


@few
@given(specs(), st.randoms(use_true_random=False))
@example(EXAMPLES[1], None)
def test_layers_in_16_bits_are_not_touched(spec: Spec, random: Any) -> None:
    models = staged(spec)
    names = list(models.slab.layers)
    chosen = names[::2] if random is None else [name for name in names if random.random() < 0.5]
    passes = squareq_fx.default_passes(models.slab, compute=dict.fromkeys(chosen, "w8a8"))
    final = squareq_fx.run(models.graphs["capture"], passes)
    stages = {stage.name: stage.graph for stage in program(final).history}
    after = laws.apply(Activations(), stages["stream"], models)
    called = {info(n).layer for n in nodes(stages["quantize"], ops.int8_linear)}
    flat = Activations()(stages["quantize"])
    assert {info(n).layer for n in nodes(flat, ops.int8_matmul)} == called & set(chosen)
    assert {info(n).layer for n in nodes(flat, ops.int8_linear)} == called - set(chosen)
    call = spec.inputs()
    assert laws.same(laws.evaluate(after, models, call), laws.evaluate(flat, models, call))


def test_a_block_of_other_decisions_is_another_function_and_equal_ones_share() -> None:
    spec = Spec(Residual(Mlp(16)), repeat=4)
    models = staged(spec)
    names = [name for name in models.slab.layers if name.endswith(".up")]
    assert len(names) == 4
    passes = squareq_fx.default_passes(models.slab, compute=dict.fromkeys((names[0], names[2]), "w8a8"))
    gm = squareq_fx.run(models.graphs["capture"], passes)
    blocks = [str(n.target) for n in gm.graph.nodes if n.op == "call_module" and str(info(n).key).startswith("blocks.")]
    assert blocks[0] == blocks[2] != blocks[1] == blocks[3]


def test_the_nodes_it_makes() -> None:
    models = in_w8a8(Spec(Residual(Mlp(16)), repeat=2))
    after = Activations()(models.graphs["stream"])
    text = squareq_fx.show(after, "block")
    assert "squareq.quantize_rows(" in text and "up_xq = " in text and "up_sx = " in text
    product = nodes(after, ops.int8_matmul)[0]
    xq, sx = product.args[:2]
    assert xq.target is sx.target is operator.getitem and xq.args[0] is sx.args[0]  # type: ignore[union-attr]
    assert (xq.meta["val"].dtype, sx.meta["val"].dtype) == (torch.int8, torch.float32)  # type: ignore[union-attr]
    assert sx.meta["val"].shape == (*xq.meta["val"].shape[:-1], 2)  # step and sum of each row  # type: ignore[union-attr]
    assert product.args[6] == torch.float32 and product.meta["stack_trace"] and info(product).layer is not None
    assert "# compute: 8 x w8a8" in squareq_fx.show(after)  # embed, pre, post, head and two in each block
    assert "# compute" not in squareq_fx.show(staged(Spec(Residual(Mlp(16)), repeat=2)).graphs["schedule"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_result_has_the_activations_type(dtype: torch.dtype) -> None:
    model = Function(lambda m, x: m.b(m.a(x)), a=nn.Linear(40, 24), b=nn.Linear(24, 8, bias=False)).to(dtype)
    x = torch.randn(5, 40, dtype=dtype)
    slab = make_slab(model, (x,))
    flat = squareq_fx.run(squareq_fx.capture(model, (x,)), [Canonicalize(), Quantize(slab, "w8a8"), Activations()])
    (output,) = next(n for n in flat.graph.nodes if n.op == "output").args[0]
    assert output.meta["val"].dtype == dtype
    plain = squareq_fx.compile(model, slab, example_inputs=(x,))
    module = emit(flat, model, slab)
    found, expected = module(x), plain(x)
    assert found.dtype == dtype
    assert 0 < laws.l2(found, expected) < 0.02
    assert torch.cosine_similarity(found.flatten().double(), expected.flatten().double(), dim=0) > 0.999


def test_rows_of_zeros_and_single_rows() -> None:
    model = Function(lambda m, x: m.a(x), a=nn.Linear(16, 8))
    x = torch.zeros(3, 16)
    slab = make_slab(model, (x,))
    gm = squareq_fx.compile(model, slab, example_inputs=(x,), compute="w8a8", progress=False)
    assert torch.equal(gm(x), model.a.bias.expand(3, 8))
    assert gm(torch.randn(1, 16)).shape == (1, 8)
    assert gm(torch.randn(0, 16)).shape == (0, 8)


# ------------------------------------------------------------------------------------------------- training


SPEC = EXAMPLES[0]


def stages_of(compute: str, backward: str = "w8a16") -> dict[str, fx.GraphModule]:
    graphs = dict(training(SPEC, compute=compute).graphs)
    graphs["activations"] = Activations(backward)(graphs["stream"])  # type: ignore[arg-type]
    return graphs


def gradients_of(gm: fx.GraphModule) -> Any:
    models = staged(SPEC)
    call = SPEC.inputs()
    outputs = laws.eager(models.dequantized, call)
    return by_graph(gm, models, call, adapters_for(gm), cotangents_for(outputs))


def cosine(found: Any, expected: Any) -> float:
    a, b = (torch.cat([g.flatten().double() for g in of.gradients.values()]) for of in (found, expected))
    return float(torch.cosine_similarity(a, b, dim=0))


def test_the_backward_keeps_16_bits_and_points_the_same_way() -> None:
    plain, coarse = (gradients_of(stages_of(mode)["activations"]) for mode in ("w8a16", "w8a8"))
    assert plain.gradients.keys() == coarse.gradients.keys()
    assert cosine(coarse, plain) > 0.99
    assert all(laws.l2(a, b) < 0.03 for a, b in zip(coarse.outputs, plain.outputs, strict=True))
    graph = stages_of("w8a8")["activations"]
    assert nodes(graph, ops.int8_linear) == [] and nodes(graph, ops.int8_linear_dx)
    assert all(len(n.args) == 5 for n in nodes(graph, ops.int8_linear_dx))


def test_the_recomputed_forward_is_the_forward() -> None:
    """The backward's own copy of a layer computes as the forward's did, or its gradients were those of another function."""
    graphs = training(SPEC, compute="w8a8").graphs
    modes = {n.args[5] if len(n.args) > 5 else "w8a16" for n in nodes(graphs["differentiate"], ops.int8_linear)}
    assert modes == {"w8a8"} and any(name.endswith("_vjp") for name in functions(graphs["differentiate"]))


def test_a_backward_in_w8a8_is_only_for_layers_that_are() -> None:
    models = training(SPEC, compute="w8a8")
    graph = laws.apply(Activations("w8a8"), models.graphs["stream"], models)
    assert all(n.args[5] == "w8a8" for n in nodes(graph, ops.int8_linear_dx))
    assert cosine(gradients_of(graph), gradients_of(stages_of("w8a16")["activations"])) > 0.99
    plain = Activations("w8a8")(training(SPEC).graphs["stream"])
    assert all(len(n.args) == 5 for n in nodes(plain, ops.int8_linear_dx))


def test_a_module_trains_in_w8a8() -> None:
    models = staged(SPEC)
    lora = squareq_fx.Lora(rank=3, targets="all")
    modules = [
        squareq_fx.compile(models.model, models.slab, example_inputs=SPEC.inputs(), compute=mode, lora=lora, progress=False)
        for mode in ("w8a16", "w8a8")
    ]
    modules[1].load_state_dict(modules[0].state_dict())
    with torch.no_grad():
        for a, b in zip(*(m.adapter_parameters().values() for m in modules), strict=True):
            a.copy_(torch.randn_like(a) / 4)
            b.copy_(a)
    for module in modules:
        module(**SPEC.inputs()).square().mean().backward()
    grads = [torch.cat([p.grad.flatten() for p in m.adapter_parameters().values()]) for m in modules]
    assert torch.cosine_similarity(*grads, dim=0) > 0.99


# ---------------------------------------------------------------------------------------------------- refusals


def test_options_and_levels() -> None:
    with pytest.raises(PassError, match="activations: backward='int4' is none of w8a16, w8a8"):
        Activations("int4")  # type: ignore[arg-type]
    with pytest.raises(PassError, match="pass activations needs a graph that is quantized, this one is canonical"):
        squareq_fx.run(staged(SPEC).graphs["canonicalize"], [Activations()])


def test_ensures_rejects_a_hidden_quantisation_and_a_foreign_scale() -> None:
    models = in_w8a8(SPEC)
    before = models.graphs["stream"]
    good = Activations()(before)
    Activations().ensures(before, good)
    with pytest.raises(PassError, match="computes in w8a8 without a quantize_rows of its own"):
        Activations().ensures(before, clone(before))
    broken = clone(good)
    first, second, *_ = nodes(functions(broken)["block"], ops.int8_matmul)
    second.args = (second.args[0], first.args[1], *second.args[2:])
    with pytest.raises(PassError, match=f"layer {info(second).layer}: its xq and sx are not of one quantize_rows"):
        Activations().ensures(before, broken)


def test_int8_products_are_refused_before_quantize() -> None:
    early = update_program(clone(Activations()(in_w8a8(SPEC).graphs["quantize"])), level=Level.CANONICAL)
    with pytest.raises(VerificationError, match="is allowed from level quantized on"):
        squareq_fx.verify.check(early)
