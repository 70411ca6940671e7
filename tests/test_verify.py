"""Every checker rejects the broken graph it is there for, and says which node it is and where it comes from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import laws
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import EXAMPLES, few, specs, staged
from torch import fx

from squareq_fx import ops
from squareq_fx.errors import VerificationError
from squareq_fx.ir import Level, clone, functions, program, update_program
from squareq_fx.verify import check, check_residency, fingerprint

aten = torch.ops.aten
STAGES = ("capture", "canonicalize", "quantize", "outline", "stream", "activations", "fuse", "attention", "schedule")


@few
@given(specs(), st.sampled_from(STAGES))
def test_every_stage_of_a_model_is_accepted(spec: Any, stage: str) -> None:
    check(staged(spec).graphs[stage])


def graph(stage: str) -> fx.GraphModule:
    return clone(staged(EXAMPLES[0]).graphs[stage])


def nodes(gm: fx.GraphModule, target: Any) -> list[fx.Node]:
    return [n for n in gm.graph.nodes if n.target is target]


def rejected(gm: fx.GraphModule, *words: str) -> None:
    with pytest.raises(VerificationError) as caught:
        check(gm)
    assert all(word in str(caught.value) for word in (*words, "model source")), str(caught.value)


def test_a_value_used_before_it_is_made() -> None:
    gm = graph("canonicalize")
    first, second = [n for n in gm.graph.nodes if n.op == "call_function"][:2]
    second.args = tuple(second.args)
    last = [n for n in gm.graph.nodes if n.op == "call_function"][-1]
    first.prepend(last)
    with pytest.raises(VerificationError, match="malformed"):
        check(gm)


def test_state_inside_the_graph() -> None:
    gm = graph("canonicalize")
    gm.register_buffer("hidden", torch.zeros(1))
    with gm.graph.inserting_before(next(n for n in gm.graph.nodes if n.op == "call_function")):
        gm.graph.get_attr("hidden")
    rejected(gm, "hidden", "get_attr is not part of the IR")


def test_a_call_of_nothing() -> None:
    gm = graph("outline")
    call = next(n for n in gm.graph.nodes if n.op == "call_module")
    call.target = "nobody"
    with pytest.raises(VerificationError, match="nobody"):
        check(gm)


@pytest.mark.parametrize(
    ("stage", "insert", "words"),
    [
        ("canonicalize", lambda g, x: g.call_function(aten.add_.Tensor, (x, x)), ("add_", "writes to its argument")),
        ("canonicalize", lambda g, x: g.call_function(aten.relu_.default, (x,)), ("relu_", "out-of-place")),
        ("canonicalize", lambda g, x: g.call_function(print, (x,)), ("print", "Python function", "torch.library")),
        ("canonicalize", lambda g, x: g.call_method("relu", (x,)), ("relu", "call_method")),
        ("capture", lambda g, x: g.call_function(ops.prefetch, ("b",), {"visit": 0, "nbytes": 1}), ("prefetch", "scheduled")),
        ("outline", lambda g, x: g.call_function(ops.evict, (x, "b", 0)), ("evict", "streamed")),
    ],
    ids=["in-place add", "in-place relu", "python", "method", "early prefetch", "early evict"],
)
def test_an_operation_that_is_not_allowed(
    stage: str, insert: Callable[[fx.Graph, fx.Node], fx.Node], words: tuple[str, ...]
) -> None:
    gm = graph(stage)
    x = next(n for n in gm.graph.nodes if n.op.startswith("call") and isinstance(n.meta.get("val"), torch.Tensor))
    with gm.graph.inserting_after(x):
        new = insert(gm.graph, x)
    new.meta["val"] = x.meta["val"]
    rejected(gm, new.name, *words)


def test_int8_nodes_are_allowed_from_quantize_on() -> None:
    gm = update_program(graph("quantize"), level=Level.CANONICAL)
    rejected(gm, "int8_linear", "quantized", "canonical")


def test_calls_are_allowed_from_outline_on() -> None:
    gm = update_program(graph("outline"), level=Level.QUANTIZED)
    rejected(gm, "calls of functions are allowed after outline")


@pytest.mark.parametrize("stage", STAGES)
def test_a_val_that_is_not_true(stage: str) -> None:
    gm = graph(stage)
    node = next(n for n in gm.graph.nodes if n.op.startswith("call") and isinstance(n.meta.get("val"), torch.Tensor))
    wrong = node.meta["val"]
    with wrong.fake_mode:
        node.meta["val"] = torch.empty((3, 1, 4), dtype=torch.float64)
    rejected(gm, node.name, "f64[3, 1, 4]", "but the operation gives")


@pytest.mark.parametrize("change", ["dtype", "stride", "device"])
def test_a_val_that_differs_in_one_thing(change: str) -> None:
    gm = graph("canonicalize")
    node = next(n for n in gm.graph.nodes if n.op == "call_function" and n.meta["val"].dim() == 3)  # type: ignore[union-attr]
    val = node.meta["val"]
    with val.fake_mode:
        if change == "dtype":
            node.meta["val"] = val.to(torch.bfloat16)
        elif change == "stride":
            node.meta["val"] = torch.empty_strided(val.shape, (1, val.shape[0], val.shape[0] * val.shape[1]))
        else:
            node.meta["val"] = val.to("meta")
    rejected(gm, node.name)


def test_a_missing_val() -> None:
    gm = graph("canonicalize")
    node = next(n for n in gm.graph.nodes if n.op == "call_function")
    del node.meta["val"]
    rejected(gm, node.name, "no meta['val']")


def test_an_operation_that_does_not_take_its_arguments() -> None:
    gm = graph("quantize")
    node = nodes(gm, ops.int8_linear)[0]
    node.args = (node.args[1], *node.args[1:])  # int8 rows where x belongs, in the wrong shape
    with pytest.raises(VerificationError, match=node.name):
        check(gm)


def test_a_call_with_the_wrong_arguments() -> None:
    gm = graph("outline")
    call = next(n for n in gm.graph.nodes if n.op == "call_module" and len(n.args) > 2)
    call.args = call.args[:-1]
    rejected(gm, call.name, "takes")
    gm = graph("outline")
    call = next(n for n in gm.graph.nodes if n.op == "call_module" and len(n.args) > 2)
    call.args = (*call.args[1:], call.args[0])
    rejected(gm, call.name, "the function wants")


def test_a_fault_inside_a_function() -> None:
    gm = graph("outline")
    name, function = next((n, f) for n, f in functions(gm).items() if nodes(f, ops.int8_linear))
    node = nodes(function, ops.int8_linear)[0]
    with node.meta["val"].fake_mode:
        node.meta["val"] = torch.empty(7)
    rejected(gm, f"in function {name}", node.name)


# ------------------------------------------------------------------------------------------------ residency


def residency(gm: fx.GraphModule, *words: str) -> None:
    with pytest.raises(VerificationError) as caught:
        check_residency(gm)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_a_load_that_is_never_evicted() -> None:
    gm = graph("stream")
    evict = nodes(gm, ops.evict)[0]
    gm.graph.erase_node(evict)
    residency(gm, "never evicted", str(evict.args[1]))


def test_a_use_after_evict() -> None:
    gm = graph("stream")
    load, evict = nodes(gm, ops.load)[0], nodes(gm, ops.evict)[0]
    load.append(evict)
    residency(gm, "gave its bytes away", load.name)


def test_a_use_after_evict_through_a_view() -> None:
    gm = graph("stream")
    load, evict = nodes(gm, ops.load)[0], nodes(gm, ops.evict)[0]
    with gm.graph.inserting_after(load):
        view = gm.graph.call_function(ops.unpack, (load, 0, [4], torch.uint8))
    with gm.graph.inserting_after(evict):
        gm.graph.call_function(aten.clone.default, (view,))
    residency(gm, "gave its bytes away", load.name)


def test_a_block_loaded_twice() -> None:
    gm = graph("stream")
    load = nodes(gm, ops.load)[0]
    with gm.graph.inserting_after(load):
        gm.graph.node_copy(load)
    residency(gm, "loaded twice", "visit")


def test_an_evict_of_something_else() -> None:
    gm = graph("stream")
    first, second = nodes(gm, ops.evict)[:2]
    second.args = (second.args[0], first.args[1], first.args[2])
    residency(gm, "not the live load")


def test_a_prefetch_that_nobody_loads() -> None:
    gm = graph("schedule")
    prefetch = nodes(gm, ops.prefetch)[0]
    load = next(n for n in nodes(gm, ops.load) if n.args[0] == prefetch.args[0])
    prefetch.kwargs = {**prefetch.kwargs, "visit": 7}
    load.kwargs = {**load.kwargs, "offset": 0}
    residency(gm)


def test_a_prefetch_of_another_size_or_place() -> None:
    for key, value in (("nbytes", 1), ("offset", 0)):
        gm = graph("schedule")
        prefetch = nodes(gm, ops.prefetch)[0]
        if prefetch.kwargs[key] == value:
            continue
        prefetch.kwargs = {**prefetch.kwargs, key: value}
        residency(gm)


def test_two_segments_in_the_same_bytes() -> None:
    gm = graph("schedule")
    prefetch = nodes(gm, ops.prefetch)[0]
    load = next(n for n in nodes(gm, ops.load) if n.args[0] == prefetch.args[0])
    before = next(n for n in nodes(gm, ops.load) if n is not load)
    for node in (prefetch, load):
        node.kwargs = {**node.kwargs, "offset": before.kwargs["offset"]}
    residency(gm, "of the arena belong to", str(before.args[0]))


def test_a_prefetch_that_comes_too_early() -> None:
    gm = graph("schedule")
    prefetches = nodes(gm, ops.prefetch)
    if len(prefetches) < 2:
        pytest.skip("needs two prefetches")
    nodes(gm, ops.load)[0].append(prefetches[-1])
    residency(gm, "of the arena belong to")


def test_the_fingerprint_sees_every_kind_of_change() -> None:
    original = graph("outline")
    before = fingerprint(original)

    def changed(edit: Callable[[fx.GraphModule], Any]) -> bool:
        gm = clone(original)
        same = fingerprint(gm)
        edit(gm)
        return fingerprint(gm) != same

    call = next(n.name for n in original.graph.nodes if n.op == "call_module")

    def find(gm: fx.GraphModule) -> fx.Node:
        return next(n for n in gm.graph.nodes if n.name == call)

    assert changed(lambda gm: setattr(find(gm), "args", find(gm).args[::-1]))
    assert changed(lambda gm: find(gm).meta.update(val=None))
    assert changed(lambda gm: update_program(gm, notes=("x",)))
    assert changed(lambda gm: next(iter(functions(gm).values())).graph.nodes.__iter__().__next__().meta.update(val=0))
    assert fingerprint(original) == before
    assert program(original).level == Level.OUTLINED


# --------------------------------------------------------------- the checker against an independent replay

BESIDE = (ops.load, ops.evict, ops.prefetch)
EDITS = ("erase", "move", "copy", "offset", "visit", "block", "nbytes")


@settings(max_examples=150)
@given(st.data())
def test_what_the_checker_accepts_a_replay_on_real_bytes_accepts(data: st.DataObject) -> None:
    """Random damage to loads, evicts and prefetches: laws.Replay, which shares nothing with the checker, must agree."""
    spec = data.draw(st.sampled_from(EXAMPLES[:3]))
    models = staged(spec)
    gm = clone(models.graphs[data.draw(st.sampled_from(["stream", "schedule"]))])
    for _ in range(data.draw(st.integers(1, 2))):
        damage(gm, data)
    try:
        check(gm)
    except VerificationError:
        return
    found = laws.evaluate(gm, models, spec.inputs())
    assert laws.same(found, laws.evaluate(models.graphs["quantize"], models, spec.inputs()))


def damage(gm: fx.GraphModule, data: st.DataObject) -> None:
    found = [n for n in gm.graph.nodes if n.target in BESIDE]
    node = data.draw(st.sampled_from(found))
    edit = data.draw(st.sampled_from(EDITS))
    others = [n for n in gm.graph.nodes if n.op not in ("placeholder", "output")]
    if edit == "erase" and not node.users:
        gm.graph.erase_node(node)
    elif edit == "move":
        data.draw(st.sampled_from(others)).append(node)
    elif edit == "copy" and node.target is not ops.load:
        place = data.draw(st.sampled_from(others))
        with gm.graph.inserting_after(place):
            gm.graph.node_copy(node, lambda n: n)
    elif edit == "block":
        other = data.draw(st.sampled_from(found))
        node.args = (*node.args[:-1], other.args[-1]) if node.target is not ops.evict else (*node.args[:2], 1)
    elif edit in node.kwargs and node.kwargs[edit] is not None:
        change = data.draw(st.sampled_from([-256, -1, 1, 256, 512]))
        node.kwargs = {**node.kwargs, edit: node.kwargs[edit] + change}
        if edit == "nbytes" and node.target is ops.load and node.kwargs["nbytes"] > 0:
            with node.meta["val"].fake_mode:
                node.meta["val"] = torch.empty(node.kwargs["nbytes"], dtype=torch.uint8)


def test_a_view_that_a_function_returns_is_seen() -> None:
    """EXAMPLES[1]'s blocks return a view of a parameter of their own, which the next block reads."""
    gm = clone(staged(EXAMPLES[1]).graphs["stream"])
    load = next(n for n in nodes(gm, ops.load) if n.args[0] == "blocks.0")
    call = next(n for n in load.users if n.op == "call_module")
    evict = next(n for n in load.users if n.target is ops.evict)
    call.append(evict)
    residency(gm, "gave its bytes away", load.name, "model source", "models.py")


def test_an_evict_twice_and_a_prefetch_twice() -> None:
    gm = graph("schedule")
    evict = nodes(gm, ops.evict)[0]
    with gm.graph.inserting_after(evict):
        gm.graph.node_copy(evict, lambda n: n)
    residency(gm, "gave its bytes away")
    gm = graph("schedule")
    prefetch = nodes(gm, ops.prefetch)[0]
    with gm.graph.inserting_after(prefetch):
        gm.graph.node_copy(prefetch, lambda n: n)
    residency(gm, "is prefetched again or after its load", str(prefetch.args[0]))


def test_a_prefetch_after_its_load() -> None:
    gm = graph("schedule")
    prefetch = nodes(gm, ops.prefetch)[0]
    next(n for n in nodes(gm, ops.load) if n.args[0] == prefetch.args[0]).append(prefetch)
    residency(gm, "is prefetched again or after its load")


@pytest.mark.parametrize("offset", [-256, 1 << 40])
def test_bytes_outside_the_arena(offset: int) -> None:
    gm = graph("schedule")
    load = nodes(gm, ops.load)[0]
    load.kwargs = {**load.kwargs, "offset": offset}
    residency(gm, load.name, "outside the arena", str(program(gm).arena_bytes))
    gm = update_program(graph("schedule"), arena_bytes=program(gm).arena_bytes - 256)
    residency(gm, "outside the arena")
