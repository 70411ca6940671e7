"""differentiate: the backward as a part of the graph, with the gradients torch.autograd finds and nothing nobody asked for."""

from __future__ import annotations

import re
from functools import partial
from typing import Any

import laws
import pytest
import torch
from gradients import adapters_for, assert_equal, by_autograd, by_graph, cotangents_for, differentiated
from hypothesis import example, given, settings
from models import (
    EXAMPLES,
    SIZES,
    Attend,
    Function,
    Mlp,
    Norm,
    Residual,
    Seq,
    Spec,
    Staged,
    few,
    specs,
    staged,
    training,
)
from torch import fx, nn

import squareq_fx
from squareq_fx import Lora, PassError, ops
from squareq_fx.ir import Level, adapter_inputs, functions, info, program
from squareq_fx.passes import Adapt, Differentiate, Outline, Schedule, Stream

ALL = Lora(rank=3, targets="all")
INPUTS = ("x", "context")
BLOCKS = Spec(Seq((Residual(Seq((Norm(), Attend()))), Residual(Mlp(33)))), repeat=3)


def outlined(models: Staged, lora: Lora | None = ALL) -> fx.GraphModule:
    flat = models.graphs["quantize"]
    return Outline()(flat if lora is None else Adapt(lora)(flat))


@settings(few, max_examples=3)
@given(specs())
@example(EXAMPLES[0])
@example(EXAMPLES[1])
@example(EXAMPLES[2])
@example(EXAMPLES[3])
def test_laws(spec: Spec) -> None:
    """Recompute: outputs bit for bit those of the graph without a backward, gradients autograd's, streamed or not."""
    models = staged(spec)
    before = outlined(models)
    after = laws.apply(Differentiate("recompute", INPUTS), before, models)
    assert program(after).level == Level.DIFFERENTIATED
    streamed = laws.apply(Stream(hold=2), after, models)
    placed = laws.apply(Schedule(slots=4), streamed, models)
    for sizes in SIZES[:2]:
        call = spec.inputs(*sizes)
        adapters = adapters_for(after, rank=sizes[1])
        expected = by_autograd(models, call, adapters, inputs=INPUTS)
        cotangents = cotangents_for(expected.outputs)
        found = by_graph(after, models, call, adapters, cotangents)
        assert_equal(found, expected, exact=partial(by_autograd, models, call, adapters, None, INPUTS, double=True))
        assert laws.same(found.outputs, laws.evaluate(before, models, call, given=adapters))
        for graph in (streamed, placed):
            again = by_graph(graph, models, call, adapters, cotangents)
            assert laws.same([*again.outputs, *again.gradients.values()], [*found.outputs, *found.gradients.values()])
    assert_notes(after, {key for key, gradient in expected.gradients.items() if gradient is None})


def assert_notes(gm: fx.GraphModule, missing: set[tuple[str, str]]) -> None:
    """What has no gradient is said, and nothing else is."""
    said = {note.partition(" has no influence")[0] for note in program(gm).notes if "gets no gradient" in note}
    assert said == {key for _, key in missing}


SAVES = ["save", *(["offload"] if hasattr(ops, "offload") else [])]


@settings(few, max_examples=2)
@given(specs().filter(lambda spec: not spec.view))
@example(EXAMPLES[0])
@example(EXAMPLES[2])
def test_what_is_kept_changes_no_gradient(spec: Spec) -> None:
    """Saved activations, here or in host memory: autograd's gradients, from the pass to the arena.

    A forward that saves runs what autograd would, and torch's matmul takes another way, and rounds otherwise, for gradients.
    """
    models = staged(spec)
    before = outlined(models)
    for mode in SAVES:
        after = laws.apply(Differentiate(mode, INPUTS), before, models)  # type: ignore[arg-type]
        placed = Schedule(slots=6)(laws.apply(Stream(hold=2), after, models))
        for sizes in SIZES[:2]:
            call = spec.inputs(*sizes)
            adapters = adapters_for(after, rank=sizes[1])
            expected = by_autograd(models, call, adapters, inputs=INPUTS)
            found = by_graph(placed, models, call, adapters, cotangents_for(expected.outputs))
            assert_equal(found, expected, exact=partial(by_autograd, models, call, adapters, None, INPUTS, double=True))
            outputs = laws.evaluate(before, models, call, given=adapters)
            assert all(laws.l2(a, b) < 1e-6 for a, b in zip(found.outputs, outputs, strict=True))


# -------------------------------------------------------------------------------------- nothing nobody asked for


def vjp_calls(gm: fx.GraphModule) -> list[str]:
    """Segments whose vector-Jacobian product is called, in order."""
    return [str(info(n).key) for n in gm.graph.nodes if n.op == "call_module" and n.name.endswith("_vjp")]


def loads(gm: fx.GraphModule) -> tuple[list[str], list[str]]:
    """Segments loaded in the forward, and in the backward."""
    nodes = list(gm.graph.nodes)
    at = next(i for i, n in enumerate(nodes) if n.target is ops.cotangent)
    found = [[str(n.args[0]) for n in part if n.target is ops.load] for part in (nodes[:at], nodes[at:])]
    return found[0], found[1]


def test_blocks_before_the_first_adapter_have_no_backward_and_are_not_loaded_for_it() -> None:
    models = training(BLOCKS, inputs=(), targets=r"blocks\.2\..*up", slots=2)
    graph = models.graphs["schedule"]
    assert vjp_calls(graph) == ["epilogue", "blocks.2"]
    forward, backward = loads(graph)
    assert forward == ["prologue", "blocks.0", "blocks.1", "blocks.2", "epilogue"]
    assert backward == [], "both were there at the turn"
    one = training(BLOCKS, inputs=(), targets=r"blocks\.2\..*up", slots=1, distance=0).graphs["schedule"]
    assert loads(one) == (forward, ["blocks.2"])
    call = BLOCKS.inputs()
    adapters = adapters_for(graph)
    expected = by_autograd(models, call, adapters)
    assert_equal(by_graph(graph, models, call, adapters, cotangents_for(expected.outputs)), expected)


def test_within_the_first_block_only_what_its_adapters_need_is_computed() -> None:
    """`up` of the first layer's gradient needs no product with that layer's own weight: nobody wants the gradient of its x."""
    models = training(BLOCKS, inputs=(), targets=r"blocks\.2\..*up")
    graph = models.graphs["differentiate"]
    (call,) = (n for n in graph.graph.nodes if n.op == "call_module" and n.name == "blocks_2_vjp")
    products = [info(n).layer for n in functions(graph)[str(call.target)].graph.nodes if n.target is ops.int8_linear_dx]
    assert len(products) == 1 and products[0].endswith(".down")  # type: ignore[union-attr]


def test_frozen_inputs_and_weights_get_no_gradient() -> None:
    graph = training(BLOCKS, inputs=()).graphs["differentiate"]
    assert {kind for kind, _ in program(graph).gradients} == {"adapter"}
    assert [key for _, key in program(graph).gradients] == list(adapter_inputs(graph))
    wrt_x = training(BLOCKS, inputs=("x",)).graphs["differentiate"]
    assert [key for kind, key in program(wrt_x).gradients if kind == "input"] == ["x"]
    for gm in (graph, wrt_x):
        weights = {tuple(n.meta["val"].shape) for n in gm.graph.nodes if info(n).kind == "weight" and n.meta["val"].dim() == 2}
        for function in functions(gm).values():
            made = [n for n in function.graph.nodes if n.op == "call_function" and isinstance(n.meta["val"], torch.Tensor)]
            shapes = {tuple(n.meta["val"].shape) for n in made if all(isinstance(s, int) for s in n.meta["val"].shape)}
            assert not shapes & (weights | {shape[::-1] for shape in weights}), "a gradient of a weight, or a float copy of it"


def test_one_product_for_each_function_and_pattern_of_activity() -> None:
    """The first block's input needs no gradient if nothing before is adapted, so it has a product of its own."""
    every = training(BLOCKS, inputs=("x",)).graphs["differentiate"]
    assert block_vjps(every) == [f"{block_function(every)}_vjp"] * 3
    later = block_vjps(training(BLOCKS, inputs=(), targets=r"blocks\..*").graphs["differentiate"])
    assert later[0] == later[1] != later[2]


def block_vjps(gm: fx.GraphModule) -> list[str]:
    names = {"blocks_0_vjp", "blocks_1_vjp", "blocks_2_vjp"}
    return [str(n.target) for n in gm.graph.nodes if n.op == "call_module" and n.name in names]


def block_function(gm: fx.GraphModule) -> str:
    return next(str(n.target) for n in gm.graph.nodes if n.op == "call_module" and info(n).key == "blocks.0")


def test_loads_come_back_in_reverse_order() -> None:
    forward, backward = loads(training(BLOCKS, slots=2).graphs["schedule"])
    assert backward == [name for name in reversed(forward) if name not in ("epilogue", "blocks.2")]
    forward, backward = loads(training(BLOCKS, slots=1, distance=0).graphs["schedule"])
    assert backward == list(reversed(forward))[1:]


# ----------------------------------------------------------------------------------------------- save, by segment


def kept(gm: fx.GraphModule) -> set[str]:
    """Segments whose forward also returns what the backward reads."""
    return {str(info(n).key) for n in gm.graph.nodes if n.op == "call_module" and str(n.target).partition("_saving")[1]}


@pytest.mark.parametrize(
    ("save", "expected"),
    [
        ("recompute", set()),
        ("save", {"prologue", "blocks.0", "blocks.1", "blocks.2", "epilogue"}),
        ({r"blocks\.[01]": "save"}, {"blocks.0", "blocks.1"}),
        ({r"blocks\.1": "recompute", r"blocks\..*": "save"}, {"blocks.0", "blocks.2"}),
        ({r"blocks": "save"}, set()),
    ],
)
def test_what_is_kept_by_segment(save: Any, expected: set[str]) -> None:
    models = staged(BLOCKS)
    after = Differentiate(save, INPUTS)(outlined(models))
    assert kept(after) == expected
    call = BLOCKS.inputs()
    adapters = adapters_for(after)
    wanted = by_autograd(models, call, adapters, inputs=INPUTS)
    assert_equal(by_graph(after, models, call, adapters, cotangents_for(wanted.outputs)), wanted)


def test_saving_recomputes_no_layer_and_keeps_no_weight() -> None:
    """The backward of a block that saved calls no int8 layer forward; what it saved are activations of the call's sizes."""
    graph = training(BLOCKS, save="save").graphs["differentiate"]
    for name, function in functions(graph).items():
        if "_vjp" in name:
            assert all(n.target is not ops.int8_linear for n in function.graph.nodes), name
    recomputing = training(BLOCKS).graphs["differentiate"]
    assert any(n.target is ops.int8_linear for n in functions(recomputing)[f"{block_function(recomputing)}_vjp"].graph.nodes)
    for node in graph.graph.nodes:
        if "_saved_" in node.name and isinstance(node.meta["val"], torch.Tensor):
            assert any(isinstance(size, torch.SymInt) for size in node.meta["val"].shape), node.name


# ----------------------------------------------------------------------------------------------- outputs and inputs


def test_several_outputs_of_which_some_have_no_gradient() -> None:
    def body(m: Any, x: torch.Tensor) -> Any:
        y = m.a(x)
        return y, x * 2, m.b(y), y.argmax(-1), y

    model = Function(body, a=nn.Linear(6, 6), b=nn.Linear(6, 4))
    _, graph = differentiated(model, {"x": torch.randn(3, 6)}, lora=ALL)
    cotangents = [n for n in graph.graph.nodes if n.target is ops.cotangent]
    assert [n.args[1] for n in cotangents] == [0, 2, 4]
    _, graph = differentiated(model, {"x": torch.randn(3, 6)}, inputs=("x",))
    assert [n.args[1] for n in graph.graph.nodes if n.target is ops.cotangent] == [0, 1, 2, 4]


def test_a_layer_read_by_several_calls_gets_the_sum() -> None:
    model = Function(lambda m, x: m.b(m.a(m.a(x))) + m.a(x).sum(-1, keepdim=True), a=nn.Linear(6, 6), b=nn.Linear(6, 4))
    differentiated(model, {"x": torch.randn(3, 6)}, lora=ALL, inputs=("x",))


def test_an_adapter_with_no_influence_gets_a_note_and_no_gradient() -> None:
    def body(m: Any, x: torch.Tensor) -> torch.Tensor:
        return m.a(x) * (m.b(x) > 0) + m.c(x).detach()

    model = Function(body, a=nn.Linear(6, 6), b=nn.Linear(6, 6), c=nn.Linear(6, 6))
    _, graph = differentiated(model, {"x": torch.randn(3, 6)}, lora=ALL)
    assert [key for _, key in program(graph).gradients] == ["a.lora_A.weight", "a.lora_B.weight"]
    silent = [f"{layer}.lora_{side}.weight" for layer in "bc" for side in "AB"]
    assert list(program(graph).notes) == [f"{key} has no influence on the output and gets no gradient" for key in silent]


def test_an_input_with_no_influence_gets_a_note() -> None:
    graph = training(Spec(Mlp(8)), inputs=("x", "context")).graphs["schedule"]
    assert [key for kind, key in program(graph).gradients if kind == "input"] == ["x"]
    assert "context has no influence on the output and gets no gradient" in program(graph).notes


def test_inputs_alone_without_adapters() -> None:
    models = staged(BLOCKS)
    after = laws.apply(Differentiate(inputs=("context",)), outlined(models, None), models)
    assert program(after).gradients == (("input", "context"),)
    call = BLOCKS.inputs()
    expected = by_autograd(models, call, {}, inputs=("context",))
    assert_equal(by_graph(after, models, call, {}, cotangents_for(expected.outputs)), expected)
    assert "prologue" not in vjp_calls(after), "it does not read the context"


def test_an_active_operation_between_the_blocks_is_differentiated_too() -> None:
    """A stretch too short to be a function of its own."""

    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(torch.relu(self.a(x)))

    def body(m: Any, x: torch.Tensor) -> torch.Tensor:
        y = m.layers[0](x)
        return (m.layers[1](y * 2) - y).tanh()

    model = Function(body, layers=nn.ModuleList([Pair(), Pair()]))
    models, graph = differentiated(model, {"x": torch.randn(3, 6)}, lora=ALL, inputs=("x",))
    assert any(n.op == "call_function" and n.target is torch.ops.aten.mul.Tensor for n in models.graphs["outline"].graph.nodes)
    assert {"mul_vjp", "sub_vjp", "tanh_vjp"} <= set(functions(graph))


# ------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"inputs": ("xx",)}, r"the model has no tensor input 'xx'; it has x, context, labels"),
        ({"inputs": ("labels",)}, r"input 'labels' is torch\.int64, which has no gradient"),
        ({}, r"nothing to differentiate by; run adapt first, or name inputs"),
    ],
)
def test_inputs_that_have_no_gradient_are_refused(options: dict[str, Any], message: str) -> None:
    models = staged(Spec(Mlp(8), labels=True))
    with pytest.raises(PassError, match=f"pass differentiate: differentiate: .*{message}"):
        squareq_fx.run(outlined(models, None), [Differentiate(**options)])


@pytest.mark.parametrize("save", ["keep", {"blocks": "all"}])
def test_an_unknown_mode_is_refused(save: Any) -> None:
    with pytest.raises(PassError, match=r"save='\w+' is none of recompute, save, offload"):
        Differentiate(save)


def test_outputs_that_depend_on_no_adapter_are_refused() -> None:
    model = Function(lambda m, x: m.a(x).detach(), a=nn.Linear(6, 6))
    with pytest.raises(PassError, match="no output of the model depends on an adapter"):
        differentiated(model, {"x": torch.randn(3, 6)}, lora=ALL)


def test_it_needs_an_outlined_graph_that_is_not_streamed() -> None:
    models = staged(BLOCKS)
    with pytest.raises(PassError, match="pass differentiate needs a graph that is outlined, this one is quantized"):
        squareq_fx.run(models.graphs["quantize"], [Differentiate(inputs=("x",))])
    with pytest.raises(PassError, match="put it before stream"):
        Differentiate(inputs=("x",))(models.graphs["stream"])


@torch.library.custom_op("squareq_fx_tests::no_derivative", mutates_args=())
def no_derivative(x: torch.Tensor) -> torch.Tensor:
    return x * 2


@no_derivative.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


LIBRARY = torch.library.Library("squareq_fx_tests", "FRAGMENT")
for name, keys in {"fallback": ("CPU", "Meta"), "below": ("CompositeExplicitAutograd",), "cut": ("CPU", "Meta")}.items():
    LIBRARY.define(f"{name}(Tensor x) -> Tensor")
    for key in keys:
        LIBRARY.impl(name, lambda x: x * 2, key)


def _without_grad(x: torch.Tensor) -> torch.Tensor:
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.squareq_fx_tests.cut.default(x)


LIBRARY.impl("cut", _without_grad, "Autograd")

UNDIFFERENTIABLE = {
    "no_derivative": no_derivative,  # raises in the backward
    "fallback": torch.ops.squareq_fx_tests.fallback,  # warns in the backward, and gives nothing
    "below": torch.ops.squareq_fx_tests.below,
    "cut": torch.ops.squareq_fx_tests.cut,  # returns a tensor that requires no grad
}


@pytest.mark.parametrize("name", UNDIFFERENTIABLE)
def test_an_operation_that_would_cut_a_gradient_is_refused_and_the_message_has_the_models_line(name: str) -> None:
    operation = UNDIFFERENTIABLE[name]
    model = Function(lambda m, x: m.b(operation(m.a(x))), a=nn.Linear(6, 6), b=nn.Linear(6, 6))
    with pytest.raises(PassError) as error:
        differentiated(model, {"x": torch.randn(3, 6)}, lora=ALL)
    message = str(error.value)
    assert message.startswith(f"pass differentiate: squareq_fx_tests.{name}.default ({name})")
    assert "torch.library.register_autograd" in message and "While executing" not in message
    assert re.search(r"model source: File .*(test_differentiate|models)\.py", message)


@pytest.mark.parametrize("name", UNDIFFERENTIABLE)
def test_where_no_gradient_flows_it_is_allowed(name: str) -> None:
    cut = UNDIFFERENTIABLE[name]
    model = Function(lambda m, x: m.b(m.a(x)) + cut(x) + m.c(cut(x)), **{n: nn.Linear(6, 6) for n in "abc"})
    differentiated(model, {"x": torch.randn(3, 6)}, lora=ALL)
