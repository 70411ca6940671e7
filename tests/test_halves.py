"""The two halves of a graph with a backward: together the whole, apart runnable, and nothing of the weights in between."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import laws
import pytest
import torch
from gradients import Found, adapters_for, assert_equal, by_autograd, by_graph, cotangents_for, differentiated
from hypothesis import example, given, settings
from models import EXAMPLES, SIZES, Attend, Function, Mlp, Norm, Residual, Seq, Spec, Staged, few, specs, staged, training
from torch import fx, nn

import squareq_fx
from squareq_fx import Lora, PassError, ops
from squareq_fx.emit import emit
from squareq_fx.gradients.halves import forward_only, halves
from squareq_fx.ir import functions, info, program
from squareq_fx.runtime import Runtime
from squareq_fx.verify import check, check_lint, check_operations, check_values

BLOCKS = Spec(Seq((Residual(Seq((Norm(), Attend()))), Residual(Mlp(33)))), repeat=4)


def run_halves(
    gm: fx.GraphModule,
    models: Staged,
    call: Mapping[str, Any],
    adapters: Mapping[str, torch.Tensor],
    cotangents: list[torch.Tensor],
    run: Any,
) -> Found:
    """Forward, then backward on what crossed, by `laws.evaluate` or `laws.printed`."""
    both = halves(gm)
    results = run(both.forward, models, call, adapters)
    count = len(results) - len(both.saved)
    given = dict(zip(both.saved, results[count:]))
    names = [info(n).key for n in both.backward.graph.nodes if n.op == "placeholder" and info(n).made_by == "halves"]
    assert names[: len(both.saved)] == list(both.saved) and len(names) == len(both.saved) + len(both.outputs)
    given |= dict(zip(names[len(both.saved) :], (cotangents[i] for i in both.outputs)))
    return Found(results[:count], dict(zip(program(gm).gradients, run(both.backward, models, call, {**adapters, **given}))))


def evaluated(gm: fx.GraphModule, models: Staged, call: Mapping[str, Any], given: Mapping[str, Any]) -> list[Any]:
    return laws.evaluate(gm, models, call, given=given)


@settings(few, max_examples=3)
@given(specs())
@example(EXAMPLES[0])
@example(EXAMPLES[1])
def test_together_they_are_the_whole(spec: Spec) -> None:
    """Bit for bit, node by node under `laws.Replay` and as the text they print as."""
    models = training(spec)
    graph = models.graphs["schedule"]
    both = halves(graph)
    for half in (both.forward, both.backward):
        for part in (half, *functions(half).values()):
            check_lint(part)
            check_operations(part, program(half).level)
            check_values(part)
        assert not program(half).gradients
    for sizes in SIZES[:2]:
        call = spec.inputs(*sizes)
        adapters = adapters_for(graph)
        cotangents = cotangents_for(by_autograd(models, call, adapters).outputs)
        whole = by_graph(graph, models, call, adapters, cotangents)
        for run in (evaluated, laws.printed):
            found = run_halves(graph, models, call, adapters, cotangents, run)
            assert laws.same([*found.outputs, *found.gradients.values()], [*whole.outputs, *whole.gradients.values()])


@pytest.mark.parametrize("save", ["save", "offload", {r"blocks\.1": "offload", r"blocks\.2": "save"}])
def test_together_they_are_the_whole_whatever_is_kept(save: Any) -> None:
    models = staged(BLOCKS)
    passes = squareq_fx.default_passes(models.slab, lora=Lora(rank=2, targets="all"), save=save, slots=3)
    graph = squareq_fx.run(models.graphs["capture"], passes)
    for sizes in SIZES[:2]:
        call = BLOCKS.inputs(*sizes)
        adapters = adapters_for(graph)
        expected = by_autograd(models, call, adapters)
        whole = by_graph(graph, models, call, adapters, cotangents_for(expected.outputs))
        assert_equal(whole, expected)
        for run in (evaluated, laws.printed):
            found = run_halves(graph, models, call, adapters, cotangents_for(expected.outputs), run)
            assert laws.same([*found.outputs, *found.gradients.values()], [*whole.outputs, *whole.gradients.values()])


@settings(few, max_examples=2)
@given(specs())
@example(EXAMPLES[1])
def test_the_forward_alone(spec: Spec) -> None:
    models = training(spec)
    graph = models.graphs["schedule"]
    alone = forward_only(graph)
    check(alone)
    assert forward_only(alone) is alone
    assert program(alone).arena_bytes == program(graph).arena_bytes
    assert not any(n.target in (ops.cotangent, ops.keep) for n in alone.graph.nodes)
    assert not any("vjp" in name for name in functions(alone))
    call = spec.inputs()
    adapters = adapters_for(graph)
    found = evaluated(alone, models, call, adapters)
    assert laws.same(found, laws.evaluate(models.graphs["outline"], models, call, given=adapters))
    assert laws.same(laws.printed(alone, models, call, adapters), found)


def test_before_the_backward_they_are_refused() -> None:
    with pytest.raises(PassError, match=r"this graph has no backward; run the differentiate pass, or compile with lora=Lora"):
        halves(staged(EXAMPLES[0]).graphs["schedule"])


def test_the_whole_graph_waits_for_a_loss() -> None:
    models = training(BLOCKS)
    graph = models.graphs["differentiate"]
    arguments = laws._arguments(graph, laws.WeightValues(models.model, models.slab, {}), BLOCKS.inputs(), adapters_for(graph))
    with pytest.raises(squareq_fx.RuntimeStateError, match=r"waits for the gradient of a loss.*value_and_grad"):
        graph(*arguments)


# ------------------------------------------------------------------------------------------------- what crosses


def crossing(models: Staged) -> list[fx.Node]:
    both = halves(models.graphs["schedule"])
    return [n for n in both.backward.graph.nodes if n.op == "placeholder" and info(n).key in both.saved]


def test_recomputing_keeps_what_enters_each_block_and_no_more() -> None:
    """The residual stream at each block, and sizes: nothing of a block's inside."""
    models = training(BLOCKS)
    tensors = [n for n in crossing(models) if isinstance(n.meta["val"], torch.Tensor)]
    assert [n.name for n in tensors] == ["prologue", "blocks_0", "blocks_1", "blocks_2", "blocks_3"]
    width = {tuple(map(str, n.meta["val"].shape))[2] for n in tensors}
    assert width == {"12"}
    assert len([n for n in crossing(training(BLOCKS, save="save")) if isinstance(n.meta["val"], torch.Tensor)]) > len(tensors)


@pytest.mark.parametrize("save", ["recompute", "save"])
def test_nothing_that_crosses_is_a_weight_or_a_view_of_one(save: Any) -> None:
    """Replayed: at the end of the forward every load is evicted or kept, and what is returned lies in none of their bytes.

    The model hands a view of each block's weights to the next block, which needs it in the backward.
    """
    spec = Spec(Residual(Mlp(9)), repeat=3, view=True)
    models = training(spec, save, slots=2 if save == "recompute" else 8)
    graph = models.graphs["schedule"]
    call, adapters = spec.inputs(), adapters_for(graph)
    expected = by_autograd(models, call, adapters, inputs=("x",))
    found = run_halves(graph, models, call, adapters, cotangents_for(expected.outputs), evaluated)
    assert_equal(found, Found(expected.outputs, expected.gradients))
    if save == "recompute":
        assert {"blocks_0_handed_copy", "blocks_1_handed_copy"} <= {n.name for n in crossing(models)}


def test_a_view_that_crosses_is_copied_right_where_it_is_made() -> None:
    """Otherwise its block would stay loaded until the backward has read it."""
    models = training(Spec(Residual(Mlp(9)), repeat=4, view=True), slots=2)
    nodes = list(models.graphs["schedule"].graph.nodes)
    copies = [n for n in nodes if n.target is torch.ops.aten.clone.default]
    assert copies
    turn = next(i for i, n in enumerate(nodes) if n.target is ops.cotangent)
    live = 0
    for node in nodes[:turn]:
        live += (node.target is ops.load) - (node.target is ops.evict)
        assert live <= 2


# ------------------------------------------------------------------------------------------------------ the turn


def ring(slots: int) -> tuple[Staged, fx.GraphModule]:
    models = training(BLOCKS, inputs=(), slots=slots, distance=slots - 1)
    return models, models.graphs["schedule"]


def names(gm: fx.GraphModule, target: Any) -> list[str]:
    return [str(n.args[0] if target is not ops.keep else n.args[1]) for n in gm.graph.nodes if n.target is target]


@pytest.mark.parametrize("slots", [1, 2, 3, 4])
def test_the_blocks_that_end_the_forward_are_not_copied_again(slots: int) -> None:
    models, graph = ring(slots)
    both = halves(graph)
    forward, backward = names(both.forward, ops.load), names(both.backward, ops.load)
    kept = names(both.forward, ops.keep)
    order = ["prologue", "blocks.0", "blocks.1", "blocks.2", "blocks.3", "epilogue"]
    assert forward == order
    assert kept == order[len(order) - slots :]
    assert sorted(backward) == sorted(order) and backward[slots:] == order[: len(order) - slots][::-1]
    whole = names(graph, ops.load)
    assert whole == forward + backward[slots:], "the whole graph loads what is kept once"
    sizes = {str(n.args[0]): int(n.kwargs["nbytes"]) for n in graph.graph.nodes if n.target is ops.load}  # type: ignore[arg-type]
    module = emit(graph, models.model, models.slab)
    output = module(**BLOCKS.inputs())
    output.sum().backward()
    assert module.runtime is not None
    first, second = list(module.runtime.history)
    everything = sum(sizes.values())
    assert first.bytes_to_device == everything
    assert second.bytes_to_device == everything - sum(sizes[name] for name in kept)
    assert second.prefetch_misses <= (slots == 1) * len(order)
    module(**BLOCKS.inputs()).sum().backward()
    assert [r.bytes_to_device for r in module.runtime.history][2:] == [first.bytes_to_device, second.bytes_to_device]
    module.shutdown()


@pytest.mark.parametrize("slots", [2, 3])
def test_loads_of_the_backward_are_prefetched(slots: int) -> None:
    """In reverse order, each before the load ahead of it has been given up."""
    _, graph = ring(slots)
    both = halves(graph)
    loaded, announced = names(both.backward, ops.load), names(both.backward, ops.prefetch)
    assert announced == loaded[slots:]
    position = {n: i for i, n in enumerate(both.backward.graph.nodes)}
    for block in announced:
        at = {n.target: position[n] for n in both.backward.graph.nodes if n.op == "call_function" and n.args[:1] == (block,)}
        between = [n for n, i in position.items() if at[ops.prefetch] < i < at[ops.load] and n.op == "call_module"]
        assert between, f"{block} is asked for only when it is needed"


def test_another_step_in_between_costs_a_copy_and_no_value() -> None:
    """The kept bytes give way; the backward loads them again."""
    models, graph = ring(2)
    module = emit(graph, models.model, models.slab)
    module.runtime = Runtime(module.runtime.store, arena_bytes=module.runtime.arena_bytes, poison=True)  # type: ignore[union-attr]
    call, other = BLOCKS.inputs(), BLOCKS.inputs(1, 9, 4, seed=3)
    module(**call).square().sum().backward()
    expected = {name: p.grad for name, p in module.adapter_parameters().items()}
    module.zero_grad()
    straight = module.runtime.last_step.bytes_to_device  # type: ignore[union-attr]
    loss = module(**call).square().sum()
    with torch.no_grad():
        module(**other)
    loss.backward()
    assert module.runtime.last_step.bytes_to_device > straight  # type: ignore[union-attr]
    for name, p in module.adapter_parameters().items():
        assert torch.equal(p.grad, expected[name]), name  # type: ignore[arg-type]
    module.shutdown()


def test_a_resident_weight_is_an_input_of_both() -> None:
    """What no function reads stays on the device; both halves take the same inputs."""
    model = Function(lambda m, x: (m.b(m.a(x)), m.free), a=nn.Linear(6, 6), b=nn.Linear(6, 4), free=torch.randn(5))
    models, _ = differentiated(model, {"x": torch.randn(3, 6)}, lora=Lora(rank=2, targets="all"))
    graph = models.graphs["schedule"]
    both = halves(graph)
    whole = [info(n).key for n in graph.graph.nodes if n.op == "placeholder"]
    for half in (both.forward, both.backward):
        inputs = [info(n) for n in half.graph.nodes if n.op == "placeholder"]
        assert [record.key for record in inputs][: len(whole)] == whole
        assert "free" in [record.key for record in inputs if record.kind == "weight"]
    assert both.outputs == (0,)
