"""outline: blocks become calls, blocks of one structure share one function, inlining gives the flat graph back."""

from __future__ import annotations

import keyword
from collections import Counter
from typing import Any

import laws
import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given
from models import EXAMPLES, SIZES, Function, Mlp, Residual, Spec, Staged, few, make_staged, specs, staged
from torch import fx, nn

import squareq_fx
from squareq_fx.errors import PassError
from squareq_fx.ir import Level, functions, info, program, weight_inputs
from squareq_fx.passes import Outline
from squareq_fx.slab import segment_layout


@few
@given(specs())
@example(EXAMPLES[0])
@example(EXAMPLES[1])
@example(EXAMPLES[2])
@example(EXAMPLES[3])
def test_laws(spec: Spec) -> None:
    models = staged(spec)
    before = models.graphs["quantize"]
    after = laws.apply(Outline(), before, models)
    assert program(after).level == Level.OUTLINED
    flat = squareq_fx.inline(after)
    assert laws.normal_form(flat) == laws.normal_form(before)
    assert provenance(flat) == provenance(before)
    assert [c.name for c in calls(Outline()(flat))] == [c.name for c in calls(after)]
    assert_weights_come_first(after)
    assert_segments(after, spec)
    for sizes in SIZES:
        call = spec.inputs(*sizes)
        found = laws.evaluate(after, models, call)
        assert laws.same(found, laws.evaluate(before, models, call))
        assert laws.same(laws.printed(after, models, call), found)


@few
@given(specs())
@example(EXAMPLES[2])
def test_a_float_graph_outlines_too(spec: Spec) -> None:
    models = staged(spec)
    before = models.graphs["canonicalize"]
    after = laws.apply(Outline(), before, models)
    assert laws.normal_form(squareq_fx.inline(after)) == laws.normal_form(before)
    assert laws.same(laws.evaluate(after, models, spec.inputs()), laws.eager(models.model, spec.inputs()))


def provenance(gm: fx.GraphModule) -> list[tuple[str | None, list[str]]]:
    """Which layer and which modules each computing node says it belongs to."""
    nodes = [n for n in gm.graph.nodes if n.op == "call_function" and not isinstance(n.meta["val"], torch.SymInt | int)]
    return [(info(n).layer, [p for p, _ in (n.meta.get("nn_module_stack") or {}).values()]) for n in nodes]


def assert_weights_come_first(gm: fx.GraphModule) -> None:
    """Each function takes its weights in the order they have in the segment's flat buffer, then its data."""
    for call in calls(gm):
        kinds = [info(n).kind if isinstance(n, fx.Node) else "" for n in call.args]
        count = kinds.count("weight")
        assert kinds[:count] == ["weight"] * count
        sizes = [(str(info(w).key), w.meta["val"].numel() * w.meta["val"].element_size()) for w in call.args[:count]]
        assert [name for name, _ in segment_layout(sizes)] == [name for name, _ in sizes]
        function = functions(gm)[call.target]
        parameters = [n for n in function.graph.nodes if n.op == "placeholder"]
        assert [info(p).kind for p in parameters] == ["weight"] * count + ["input"] * (len(parameters) - count)


def assert_segments(gm: fx.GraphModule, spec: Spec) -> None:
    """A segment is a block, or what lies between two; its name stands for one set of weights."""
    named: dict[str, list[str | None]] = {}
    for call in calls(gm):
        weights = [info(a).key for a in call.args if isinstance(a, fx.Node) and info(a).kind == "weight"]
        assert named.setdefault(str(info(call).key), weights) == weights
    blocks = [str(info(c).key) for c in calls(gm) if info(c).key in program(gm).block_paths]
    assert len(blocks) == len(program(gm).block_paths) * spec.visits
    for block in set(blocks):
        assert all(key is None or key.startswith(("blocks.", "pre.", "classes.")) for key in named[block])


def calls(gm: fx.GraphModule) -> list[fx.Node]:
    return [n for n in gm.graph.nodes if n.op == "call_module"]


def outlined(model: nn.Module, x: torch.Tensor, **options: Any) -> fx.GraphModule:
    models = make_staged(model, (x,), until="canonicalize")
    after = laws.apply(Outline(**options), models.graphs["canonicalize"], models)
    assert laws.same(laws.evaluate(after, models, {"x": x}), laws.eager(model, (x,)))
    return after


class Layer(nn.Module):
    def __init__(self, width: int = 8, bias: bool = True, eps: float = 1e-5, factor: float = 1.0) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=eps)
        self.up, self.down = nn.Linear(width, 2 * width, bias=bias), nn.Linear(2 * width, width)
        self.factor = factor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.factor * self.down(F.gelu(self.up(self.norm(x))))


def run_all(model: Any, x: torch.Tensor) -> torch.Tensor:
    for layer in model.layers:
        x = layer(x)
    return x


def test_equal_blocks_share_one_function() -> None:
    after = outlined(Function(run_all, layers=nn.ModuleList([Layer() for _ in range(4)])), torch.randn(2, 8))
    assert Counter(c.target for c in calls(after)) == {"layer": 4}
    assert [info(c).key for c in calls(after)] == [f"layers.{i}" for i in range(4)]
    assert [c.name for c in calls(after)] == [f"layers_{i}" for i in range(4)]


@pytest.mark.parametrize("other", [{"bias": False}, {"eps": 1e-6}, {"factor": 0.5}], ids=lambda o: next(iter(o)))
def test_blocks_that_differ_do_not(other: dict[str, Any]) -> None:
    layers = nn.ModuleList([Layer(), Layer(**other), Layer()])
    after = outlined(Function(run_all, layers=layers), torch.randn(2, 8))
    assert [c.target for c in calls(after)] == ["layer", "layer_2", "layer"]


def test_a_difference_in_a_size_or_stride_is_one() -> None:
    def body(m: Any, x: torch.Tensor) -> torch.Tensor:
        return m.layers[1](m.layers[0](x).flip(0).transpose(0, 1))

    layers = nn.ModuleList([Layer(), Layer()])
    after = outlined(Function(body, layers=layers), torch.randn(2, 3, 8))
    assert {c.target for c in calls(after)} >= {"layer", "layer_2"}


def test_a_block_visited_twice_is_one_segment_and_one_function() -> None:
    def body(m: Any, x: torch.Tensor) -> torch.Tensor:
        return run_all(m, run_all(m, x))

    after = outlined(Function(body, layers=nn.ModuleList([Layer(), Layer()])), torch.randn(2, 8))
    assert [info(c).key for c in calls(after)] == ["layers.0", "layers.1"] * 2
    assert [c.name for c in calls(after)] == ["layers_0", "layers_1", "layers_0_v1", "layers_1_v1"]
    assert set(functions(after)) == {"layer"}
    assert len(weight_inputs(after)) == 12


def test_without_blocks_the_whole_model_is_one_function() -> None:
    after = outlined(Function(lambda m, x: m.a(x).relu(), a=nn.Linear(8, 8)), torch.randn(2, 8))
    assert [c.target for c in calls(after)] == ["model"] and info(calls(after)[0]).key == "model"


def test_what_lies_between_blocks_is_named_after_what_it_runs() -> None:
    def body(m: Any, x: torch.Tensor) -> torch.Tensor:
        x = m.middle(m.layers[0](m.first(x)))
        return m.last(m.layers[1](x) * 2)

    state = {"first": nn.Linear(8, 8), "middle": nn.Linear(8, 8, bias=False), "last": nn.Linear(8, 8)}
    after = outlined(Function(body, layers=nn.ModuleList([Layer(), Layer()]), **state), torch.randn(2, 8))
    assert [info(c).key for c in calls(after)] == ["prologue", "layers.0", "glue.middle", "layers.1", "epilogue"]
    assert [c.target for c in calls(after)] == ["prologue", "layer", "glue", "layer", "epilogue"]


def test_two_stretches_of_one_owner_are_told_apart() -> None:
    def body(m: Any, x: torch.Tensor) -> torch.Tensor:
        x = m.layers[0](x) * m.norm.weight
        x = m.layers[1](x) + m.norm.bias
        return m.layers[2](x)

    state = {"layers": nn.ModuleList([Layer() for _ in range(3)]), "norm": nn.LayerNorm(8)}
    after = outlined(Function(body, **state), torch.randn(2, 8))
    assert [info(c).key for c in calls(after)] == ["layers.0", "glue.norm", "layers.1", "glue.norm.2", "layers.2"]


def test_small_stretches_without_weights_stay_in_sight() -> None:
    def body(m: Any, x: torch.Tensor) -> torch.Tensor:
        return m.layers[1]((m.layers[0](x) * 2).relu() + 1)

    model = Function(body, layers=nn.ModuleList([Layer(), Layer()]))
    assert [c.target for c in calls(outlined(model, torch.randn(2, 8)))] == ["layer", "layer"]
    named = [info(c).key for c in calls(outlined(model, torch.randn(2, 8), min_nodes=3))]
    assert named == ["layers.0", "glue.after.layers.0", "layers.1"]


def test_sizes_a_function_can_read_off_its_data_are_not_arguments() -> None:
    class Reshaping(Layer):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x.view(x.shape[0], x.shape[1], 2, 4).reshape(x.shape[0], x.shape[1], 8))

    after = outlined(Function(run_all, layers=nn.ModuleList([Reshaping(), Reshaping()])), torch.randn(2, 3, 8))
    for call in calls(after):
        assert all(isinstance(a.meta["val"], torch.Tensor) for a in call.args)
    assert len(functions(after)) == 1


@pytest.mark.parametrize("name", ["Graph", "Lambda", "Forward", "Double", "Training", "Class", "Device", "History", "Meta"])
def test_a_block_class_may_have_any_name(name: str) -> None:
    kind = type(name, (Layer,), {})
    models = make_staged(Function(run_all, layers=nn.ModuleList([kind(), kind()])), (torch.randn(2, 8),))
    (function,) = functions(models.graphs["schedule"])
    assert function.isidentifier() and not keyword.iskeyword(function)
    module = squareq_fx.emit.emit(models.graphs["schedule"], models.model, models.slab)
    x = torch.randn(3, 8)
    assert laws.l2(module(x), models.dequantized(x)) < 1e-5
    assert module.device == torch.device("cpu") and module.history[-1].name == "schedule"


def test_the_order_of_nodes_stays_and_each_is_in_its_block() -> None:
    models = staged(EXAMPLES[0])
    after = models.graphs["outline"]
    for call in calls(after):
        block = info(call).key
        if block not in program(after).block_paths:
            continue
        shared = next(info(c).key for c in calls(after) if c.target == call.target)
        for node in functions(after)[call.target].graph.nodes:
            stack = node.meta.get("nn_module_stack") or {}
            if node.op == "call_function" and stack:
                assert any(path.partition("@")[0] == shared for path, _ in stack.values())


def test_nodes_outside_any_function_need_no_weights() -> None:
    for spec in EXAMPLES:
        gm = staged(spec).graphs["outline"]
        for node in gm.graph.nodes:
            if node.op == "call_function":
                assert not any(info(a).kind == "weight" for a in node.all_input_nodes)


def test_the_inverse_keeps_records_and_leaves_its_input_alone() -> None:
    models = staged(Spec(Residual(Mlp(8))))
    gm = models.graphs["outline"]
    written = laws.text(gm)
    flat = squareq_fx.inline(gm)
    assert laws.text(gm) == written and not functions(flat)
    assert program(flat).level == Level.QUANTIZED and program(flat).call is program(gm).call
    assert laws.normal_form(squareq_fx.inline(flat)) == laws.normal_form(flat)
    found = laws.evaluate(flat, models, Spec(Residual(Mlp(8))).inputs())
    assert laws.same(found, laws.evaluate(gm, models, Spec(Residual(Mlp(8))).inputs()))


def test_a_streamed_graph_cannot_be_inlined_into_a_flat_one_unseen() -> None:
    """Its loads would sit among operations of a level that knows none: the checker says so."""
    models: Staged = staged(Spec(Residual(Mlp(8))))
    flat = squareq_fx.inline(models.graphs["stream"])
    with pytest.raises(PassError, match="squareq.load.default is allowed from level streamed on"):
        squareq_fx.verify.check(flat)
