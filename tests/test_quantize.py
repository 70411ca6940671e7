"""quantize: every call of a slab layer computes on the slab's INT8 rows, and nothing else changes (gate 1)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import laws
import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given
from models import EXAMPLES, SIZES, Function, Mlp, Spec, Staged, dequantized, few, make_slab, specs, staged
from torch import fx, nn

import squareq_fx
from squareq_fx import ops
from squareq_fx.emit import emit
from squareq_fx.errors import PassError
from squareq_fx.ir import Level, clone, info, program, weight_inputs
from squareq_fx.kernels.reference import dequantize
from squareq_fx.passes import Canonicalize, Outline, Quantize

LINEAR = torch.ops.aten.linear.default
EPSILON = torch.finfo(torch.float32).eps


@few
@given(specs())
@example(EXAMPLES[0])
@example(EXAMPLES[1])
@example(EXAMPLES[2])
@example(EXAMPLES[3])
def test_laws(spec: Spec) -> None:
    models = staged(spec)
    before = models.graphs["canonicalize"]
    after = laws.apply(Quantize(models.slab), before, models)
    assert program(after).level == Level.QUANTIZED
    assert_bijection(before, after, models)
    for sizes in SIZES:
        call = spec.inputs(*sizes)
        found = laws.evaluate(after, models, call)
        assert laws.same(laws.printed(after, models, call), found)
        expected = laws.eager(models.dequantized, call)
        assert all(laws.l2(a, b) < 1e-5 for a, b in zip(found, expected, strict=True))


@few
@given(specs())
@example(EXAMPLES[1])
@example(EXAMPLES[2])
def test_canonicalize_and_quantize_commute(spec: Spec) -> None:
    models = staged(spec)
    first = Canonicalize()(Quantize(models.slab)(models.graphs["capture"]))
    second = Quantize(models.slab)(Canonicalize()(models.graphs["capture"]))
    assert laws.normal_form(first) == laws.normal_form(second)
    assert program(first).notes == program(second).notes


@few
@given(specs())
@example(EXAMPLES[0])
@example(EXAMPLES[1])
def test_each_layer_is_within_half_a_step_a_weight(spec: Spec) -> None:
    """|dy| <= sum|x| * scale / 2 for each output, plus what rounding the sums of both products can add."""
    models = staged(spec)
    float_weights = dict(models.model.named_modules(remove_duplicate=False))
    checked = []

    def observe(node: fx.Node, args: Any, y: torch.Tensor) -> None:
        if node.target is not ops.int8_linear:
            return
        x, qweight, scale, zero_point, bias = args
        layer = float_weights[info(node).layer]
        weight = layer.weight.double()
        exact = x.double() @ weight.t() + (0 if bias is None else bias.double())
        half_a_step = x.abs().double().sum(-1, keepdim=True) * scale.double() / 2
        magnitude = x.abs().double() @ weight.abs().t() + 2 * half_a_step + (0 if bias is None else bias.abs().double())
        accumulation = (x.shape[-1] + 3) * EPSILON * magnitude
        assert bool(((y.double() - exact).abs() <= half_a_step + accumulation).all()), info(node).layer
        assert (
            float((dequantize(qweight, scale, zero_point, x.shape[-1]) - layer.weight).abs().sub(scale[:, None] / 2).max())
            < 1e-7
        )
        checked.append(node)

    laws.evaluate(models.graphs["quantize"], models, spec.inputs(), observe=observe)
    assert len(checked) == sum(n.target is ops.int8_linear for n in models.graphs["quantize"].graph.nodes)


def assert_bijection(before: fx.GraphModule, after: fx.GraphModule, models: Staged) -> None:
    """Gate 1: counted from the float graph alone, layer by layer through the tensors that are tied."""
    tied = program(before).tied
    keys = {tied.get(f"{name}.weight", f"{name}.weight") for name in models.slab.layers}
    called = Counter(info(n.args[1]).key for n in before.graph.nodes if n.target is LINEAR and info(n.args[1]).key in keys)
    found = [n for n in after.graph.nodes if n.target is ops.int8_linear]
    assert Counter(tied.get(f"{info(n).layer}.weight", f"{info(n).layer}.weight") for n in found) == called
    for node in found:
        entry = models.slab.layers[str(info(node).layer)]
        assert [info(a).key for a in node.args[1:4]] == [entry.qweight_key, entry.scale_key, entry.zero_point_key]
        assert node.args[4] is None or info(node.args[4]).key == entry.bias_key
        assert node.meta["stack_trace"] and node.meta["nn_module_stack"]
    added = {n for n in after.graph.nodes if n.op == "placeholder" and info(n).made_by == "quantize"}
    assert added == {argument for node in found for argument in node.args[1:] if argument is not None}
    others = Counter(str(n.target) for n in before.graph.nodes if n.op == "call_function" and n.target is not LINEAR)
    kept = Counter(
        str(n.target) for n in after.graph.nodes if n.op == "call_function" and n.target not in (LINEAR, ops.int8_linear)
    )
    own_bias = sum(1 for n in after.graph.nodes if info(n).made_by == "quantize" and n.target is torch.ops.aten.add.Tensor)
    kept["aten.add.Tensor"] -= own_bias
    assert +kept == +others


def quantized(model: nn.Module, x: torch.Tensor, **options: Any) -> fx.GraphModule:
    """The model's quantised graph, after it was seen to compute what the dequantised model does."""
    slab = make_slab(model, (x,), **options)
    graph = Canonicalize()(squareq_fx.capture(model, (x,)))
    models = Staged(model, slab, {}, dequantized(model, slab))
    after = laws.apply(Quantize(slab), graph, models)
    for found, expected in zip(laws.evaluate(after, models, {"x": x}), laws.eager(models.dequantized, (x,)), strict=True):
        assert laws.l2(found, expected) < (1e-5 if x.dtype == torch.float32 else 2e-2)
    return after


def int8_layers(gm: fx.GraphModule) -> list[str | None]:
    return [info(n).layer for n in gm.graph.nodes if n.target is ops.int8_linear]


def test_a_layer_called_twice_has_two_nodes_and_one_weight() -> None:
    after = quantized(Function(lambda m, x: m.a(m.a(x)), a=nn.Linear(6, 6)), torch.randn(3, 6))
    assert int8_layers(after) == ["a", "a"]
    assert list(weight_inputs(after)) == ["a.qweight", "a.scale", "a.zero_point", "a.bias"]


def test_a_layer_that_is_never_called_is_reported() -> None:
    after = quantized(Function(lambda m, x: m.a(x), a=nn.Linear(6, 6), never=nn.Linear(6, 2)), torch.randn(3, 6))
    assert program(after).notes == ("slab layer never is never called by models.Function",)
    assert int8_layers(after) == ["a"]


def test_a_shared_module_is_one_layer_whatever_path_it_is_called_by() -> None:
    shared = nn.Linear(6, 6)
    model = Function(lambda m, x: m.two[0](m.one[0](x)), one=nn.Sequential(shared), two=nn.Sequential(shared), three=shared)
    after = quantized(model, torch.randn(3, 6))
    assert int8_layers(after) == ["one.0", "one.0"] and program(after).notes == ()


def test_layers_that_share_a_weight_are_each_quantised_with_their_own_bias() -> None:
    model = Function(lambda m, x: m.b(m.a(x)), a=nn.Linear(6, 6), b=nn.Linear(6, 6))
    model.b.weight = model.a.weight
    after = quantized(model, torch.randn(3, 6))
    assert int8_layers(after) == ["a", "b"] and program(after).notes == ()
    assert [info(n.args[4]).key for n in after.graph.nodes if n.target is ops.int8_linear] == ["a.bias", "b.bias"]


def test_layers_that_share_weight_and_bias() -> None:
    model = Function(lambda m, x: m.b(m.a(x)), a=nn.Linear(6, 6), b=nn.Linear(6, 6))
    model.b.weight, model.b.bias = model.a.weight, model.a.bias
    assert int8_layers(quantized(model, torch.randn(3, 6))) == ["a", "b"]


@pytest.mark.parametrize("embedding_first", [True, False])
def test_a_layer_tied_to_an_embedding_is_quantised_and_the_embedding_is_not(embedding_first: bool) -> None:
    parts = {"table": nn.Embedding(11, 6), "head": nn.Linear(6, 11)}
    model = Function(lambda m, x: m.head(m.table(x)), **(parts if embedding_first else dict(reversed(parts.items()))))
    model.head.weight = model.table.weight
    x = torch.randint(0, 11, (3, 5))
    slab = make_slab(model, (x,))
    after = squareq_fx.run(squareq_fx.capture(model, (x,)), [Canonicalize(), Quantize(slab)])
    assert int8_layers(after) == ["head"] and "table.weight" in weight_inputs(after)
    reference = Function(lambda m, x: m.head(m.table(x)), table=model.table, head=nn.Linear(6, 11))
    parts = [slab.tensor(f"head.{leaf}") for leaf in ("qweight", "scale", "zero_point")]
    reference.head.weight.copy_(dequantize(*parts, 6))
    reference.head.bias = model.head.bias
    assert laws.l2(emit(after, model, slab)(x), reference(x)) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_functional_call_with_another_bias_adds_that(dtype: torch.dtype) -> None:
    model = Function(
        lambda m, x: F.linear(x, m.a.weight, m.other) + m.a(x) + F.linear(x, m.a.weight),
        a=nn.Linear(6, 5),
        other=torch.randn(5),
    ).to(dtype)
    after = quantized(model, torch.randn(3, 6, dtype=dtype))
    assert int8_layers(after) == ["a"] * 3
    assert [n.args[4] is None for n in after.graph.nodes if n.target is ops.int8_linear] == [True, False, True]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_bias_that_something_else_reads_too_stays_as_it_is(dtype: torch.dtype) -> None:
    model = Function(lambda m, x: m.a(x) * m.a.bias, a=nn.Linear(6, 5)).to(dtype)
    after = quantized(model, torch.randn(3, 6, dtype=dtype))
    assert int8_layers(after) == ["a"]
    assert weight_inputs(after)["a.bias"].meta["val"].dtype == dtype


@pytest.mark.parametrize("width", [1, 63, 64, 65, 100])
def test_odd_widths_are_padded_in_the_slab_alone(width: int) -> None:
    after = quantized(Function(lambda m, x: m.a(x), a=nn.Linear(width, 3, bias=False)), torch.randn(2, width))
    assert weight_inputs(after)["a.qweight"].meta["val"].shape == (3, -(-width // 64) * 64)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_output_keeps_the_inputs_dtype(dtype: torch.dtype) -> None:
    after = quantized(Function(lambda m, x: m.a(x), a=nn.Linear(8, 4)).to(dtype), torch.randn(2, 8, dtype=dtype))
    (output,) = next(n for n in after.graph.nodes if n.op == "output").args[0]
    assert output.meta["val"].dtype == dtype
    assert weight_inputs(after)["a.bias"].meta["val"].dtype == torch.float32


def test_excluded_layers_embeddings_and_norms_stay_float() -> None:
    model = Function(
        lambda m, x: m.b(m.norm(m.a(x))) + m.table(torch.zeros(1, dtype=torch.int64)),
        a=nn.Linear(8, 8),
        b=nn.Linear(8, 8),
        norm=nn.LayerNorm(8),
        table=nn.Embedding(3, 8),
    )
    after = quantized(model, torch.randn(2, 8), exclude=["b"])
    assert int8_layers(after) == ["a"]
    assert sum(n.target is LINEAR for n in after.graph.nodes) == 1
    assert {"b.weight", "b.bias", "norm.weight", "table.weight"} <= set(weight_inputs(after))


@pytest.mark.parametrize(
    ("body", "operation"),
    [
        (lambda m, x: m.a(x) @ m.a.weight, "aten.matmul"),
        (lambda m, x: m.a(x) + m.a.weight.sum(), "aten.sum"),
        (lambda m, x: torch.addmm(m.a.bias, x, m.a.weight), "aten.addmm"),
        (lambda m, x: F.linear(m.a.weight, m.a.weight), "aten.linear"),
        (lambda m, x: F.linear(x, m.a.weight * 2), "aten.mul"),
        (lambda m, x: (m.a(x), m.a.weight), "output"),
    ],
    ids=["matmul", "sum", "addmm", "as_input", "scaled", "returned"],
)
def test_a_weight_used_in_any_other_way_is_refused(body: Callable[..., Any], operation: str) -> None:
    model, x = Function(body, a=nn.Linear(6, 6)), torch.randn(6, 6)
    graph = squareq_fx.capture(model, (x,))
    with pytest.raises(PassError) as error:
        squareq_fx.run(graph, [Canonicalize(), Quantize(make_slab(model, (x,)))])
    message = str(error.value)
    assert message.startswith("pass quantize: the weight of slab layer a is read by") and operation in message
    assert "exclude=['a']" in message and "model source:" in message
    if operation != "output":
        assert "test_quantize.py" in message or "models.py" in message
    slab = make_slab(model, (x,), exclude=["a"])  # what the message says helps
    after = squareq_fx.run(graph, [Canonicalize(), Quantize(slab)])
    assert laws.same(laws.eager(emit(after, model, slab), (x,)), laws.eager(model, (x,)))
    assert int8_layers(after) == []


def test_a_slab_of_another_model_is_refused_with_both_signatures() -> None:
    model, other = (Function(lambda m, x: m.a(x), a=nn.Linear(6, n)) for n in (5, 7))
    slab = make_slab(other, (torch.randn(2, 6),))
    graph = squareq_fx.capture(model, (torch.randn(2, 6),))
    with pytest.raises(PassError, match=f"{slab.signature}.*{program(graph).model_signature}.*build_slab"):
        Quantize(slab)(graph)


def test_float64_is_refused_and_the_message_says_where() -> None:
    model, x = Function(lambda m, x: m.a(x), a=nn.Linear(6, 6)).double(), torch.randn(2, 6, dtype=torch.float64)
    with pytest.raises(PassError, match="pass quantize: .*torch.float64, not float32"):
        squareq_fx.run(squareq_fx.capture(model, (x,)), [Quantize(make_slab(model, (x,)))])


def test_after_outline_it_is_refused() -> None:
    models = staged(Spec(Mlp(8)))
    with pytest.raises(PassError, match="put it before outline"):
        Quantize(models.slab)(Outline()(models.graphs["canonicalize"]))


def test_two_slabs_in_two_passes_quantise_each_its_own() -> None:
    model = Function(lambda m, x: m.b(m.a(x)), a=nn.Linear(6, 6), b=nn.Linear(6, 6))
    x = torch.randn(3, 6)
    first, second = make_slab(model, (x,), include_prefixes=["a"]), make_slab(model, (x,), include_prefixes=["b"])
    both = Quantize(second)(Quantize(first)(squareq_fx.capture(model, (x,))))
    assert int8_layers(both) == ["a", "b"]


def ensures(models: Staged, after: fx.GraphModule) -> None:
    Quantize(models.slab).ensures(models.graphs["canonicalize"], after)


def test_ensures_rejects_a_missed_call_a_duplicate_and_a_stranger() -> None:
    models = staged(Spec(Mlp(8)))
    good = models.graphs["quantize"]
    ensures(models, good)
    with pytest.raises(PassError, match="is called 1 times, but has 0 int8 nodes"):
        ensures(models, models.graphs["canonicalize"])

    doubled = clone(good)
    node = next(n for n in doubled.graph.nodes if n.target is ops.int8_linear)
    with doubled.graph.inserting_after(node):
        doubled.graph.node_copy(node, lambda n: n)
    with pytest.raises(PassError, match="layer embed is called 1 times, but has 2 int8 nodes"):
        ensures(models, doubled)

    stranger = clone(good)
    node = next(n for n in stranger.graph.nodes if n.target is ops.int8_linear)
    with stranger.graph.inserting_after(node):
        copy = stranger.graph.node_copy(node, lambda n: n)
    copy.args = (copy.args[0], next(n for n in stranger.graph.nodes if n.op == "placeholder"), *copy.args[2:])
    with pytest.raises(PassError, match="1 int8 nodes belong to no layer"):
        ensures(models, stranger)

    leftover = clone(good)
    first = next(n for n in leftover.graph.nodes if n.op == "placeholder" and info(n).key == "embed.qweight")
    squareq_fx.edit.add_weight(first, "embed.weight", first.meta["val"], made_by="test")
    with pytest.raises(PassError, match="float weight embed.weight is still an input"):
        ensures(models, leftover)
