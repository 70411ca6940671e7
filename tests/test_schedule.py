"""schedule: which bytes of the arena each load owns, and where its copy starts. A permutation, never over budget."""

from __future__ import annotations

from typing import Any

import laws
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from models import EXAMPLES, SIZES, Function, Mlp, Residual, Spec, few, make_staged, specs, staged
from torch import fx, nn

import squareq_fx
from squareq_fx import ops
from squareq_fx.errors import PassError
from squareq_fx.ir import Level, program
from squareq_fx.passes import Schedule

RINGS = st.integers(2, 5).flatmap(lambda slots: st.tuples(st.just(slots), st.integers(0, slots - 1)))


@few
@given(specs(), RINGS)
@example(EXAMPLES[0], (2, 1))
@example(EXAMPLES[1], (3, 1))
@example(EXAMPLES[2], (4, 3))
@example(EXAMPLES[3], (2, 0))
def test_laws(spec: Spec, ring: tuple[int, int]) -> None:
    models = staged(spec)
    before = models.graphs["stream"]
    slots, distance = ring
    try:
        after = laws.apply(Schedule(slots, distance), before, models)
    except PassError as error:  # blocks that hand on views stay longer than their turn
        assert spec.view and "no slot is free" in str(error) and f"more slots than {slots}" in str(error)
        after = laws.apply(Schedule(slots + 8, distance), before, models)
    assert program(after).level == Level.SCHEDULED
    assert laws.order(after) == laws.order(before), "not a permutation: something moved, came or went"
    assert_prefetches(after, distance)
    for sizes in SIZES:
        call = spec.inputs(*sizes)
        replay = laws.Replay(after, models)
        found = replay.run(call)
        assert replay.peak <= program(after).arena_bytes
        assert laws.same(found, laws.evaluate(before, models, call))
    assert laws.same(laws.printed(after, models, call), found)


@few
@given(specs(), st.integers(2, 4))
@example(EXAMPLES[0], 2)
def test_the_budget_is_kept_to_the_byte(spec: Spec, slots: int) -> None:
    before = staged(spec).graphs["stream"]
    if spec.view:
        slots += 8
    arena = program(Schedule(slots, 1)(before)).arena_bytes
    largest = max((n for n in before.graph.nodes if n.target is ops.load), key=lambda n: n.kwargs["nbytes"])
    assert arena % 256 == 0 and arena >= largest.kwargs["nbytes"]
    assert program(Schedule(slots, 1, budget=arena)(before)).arena_bytes == arena
    for budget in (arena - 1, largest.kwargs["nbytes"] - 1, 0):
        with pytest.raises(PassError) as error:
            Schedule(slots, 1, budget=budget)(before)
        assert repr(largest.args[0]) in str(error.value) and f"{budget:,}" in str(error.value)


def assert_prefetches(gm: fx.GraphModule, distance: int) -> None:
    """A copy is started at most `distance` loads ahead, once, to where its load will look for it."""
    loads = [n for n in gm.graph.nodes if n.target is ops.load]
    position = {node: i for i, node in enumerate(gm.graph.nodes)}
    prefetches = {(n.args[0], n.kwargs["visit"]): n for n in gm.graph.nodes if n.target is ops.prefetch}
    assert len(prefetches) == sum(n.target is ops.prefetch for n in gm.graph.nodes)
    assert distance or not prefetches
    for index, load in enumerate(loads):
        offset = load.kwargs["offset"]
        assert offset % 256 == 0
        assert offset + load.kwargs["nbytes"] <= program(gm).arena_bytes
        prefetch = prefetches.pop((load.args[0], load.kwargs["visit"]), None)
        if prefetch is not None:
            assert position[prefetch] < position[load]
            assert {k: prefetch.kwargs[k] for k in ("nbytes", "offset")} == {k: load.kwargs[k] for k in ("nbytes", "offset")}
            assert prefetch.name == load.name.replace("load_", "prefetch_", 1)
            begun = sum(position[other] < position[prefetch] for other in loads)
            assert index - begun < distance
        elif index and distance:
            # Nothing was started ahead: then no slot was free before the load itself.
            held = [
                e for e in loads[:index] if not any(u.target is ops.evict and position[u] < position[load] for u in e.users)
            ]
            assert held
    assert not prefetches, "a prefetch without a load"


def chain(blocks: int, widths: tuple[int, ...] = (8,)) -> Any:
    class Layer(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, width), nn.Linear(width, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(self.a(x))

    def body(m: Any, x: torch.Tensor) -> torch.Tensor:
        for layer in m.layers:
            x = layer(x)
        return x

    layers = nn.ModuleList([Layer(widths[i % len(widths)]) for i in range(blocks)])
    return make_staged(Function(body, layers=layers), (torch.randn(2, 8),), until="stream")


def sequence(gm: fx.GraphModule) -> list[str]:
    names = {ops.load: "load", ops.evict: "evict", ops.prefetch: "prefetch"}
    result = []
    for node in gm.graph.nodes:
        if node.op == "call_module":
            result.append("run")
        elif node.target in names:
            result.append(f"{names[node.target]} {node.args[node.target is ops.evict][-1]}")
    return result


def test_two_slots_one_ahead() -> None:
    """The copy of the next block runs while this one computes."""
    after = Schedule(2, 1)(chain(3).graphs["stream"])
    assert sequence(after) == [
        *("load 0", "prefetch 1", "run", "evict 0"),
        *("load 1", "prefetch 2", "run", "evict 1"),
        *("load 2", "run", "evict 2"),
    ]
    nbytes = {n.args[0]: n.kwargs["nbytes"] for n in after.graph.nodes if n.target is ops.load}
    slot = -(-max(nbytes.values()) // 256) * 256
    assert [n.kwargs["offset"] for n in after.graph.nodes if n.target is ops.load] == [0, slot, 0]
    assert program(after).arena_bytes == 2 * slot


def test_three_slots_two_ahead() -> None:
    after = Schedule(3, 2)(chain(4).graphs["stream"])
    assert sequence(after) == [
        *("load 0", "prefetch 1", "prefetch 2", "run", "evict 0"),
        *("load 1", "prefetch 3", "run", "evict 1"),
        *("load 2", "run", "evict 2", "load 3", "run", "evict 3"),
    ]


def test_no_distance_no_prefetch() -> None:
    after = Schedule(1, 0)(chain(3).graphs["stream"])
    assert sequence(after) == [*("load 0", "run", "evict 0"), *("load 1", "run", "evict 1"), *("load 2", "run", "evict 2")]
    assert {n.kwargs["offset"] for n in after.graph.nodes if n.target is ops.load} == {0}


def test_more_slots_than_segments_are_not_paid_for() -> None:
    small = program(Schedule(3, 1)(chain(3).graphs["stream"]))
    large = program(Schedule(100, 50)(chain(3).graphs["stream"]))
    assert small.arena_bytes == large.arena_bytes


def test_a_slot_is_as_large_as_the_largest_segment() -> None:
    models = chain(4, widths=(8, 100))
    after = Schedule(2, 1)(models.graphs["stream"])
    largest = max(n.kwargs["nbytes"] for n in after.graph.nodes if n.target is ops.load)
    assert program(after).arena_bytes == 2 * (-(-largest // 256) * 256)


@pytest.mark.parametrize(("slots", "distance"), [(1, 1), (2, 2), (0, 0), (2, -1), (-1, -2), (3, 5)])
def test_a_ring_that_cannot_turn_is_refused(slots: int, distance: int) -> None:
    with pytest.raises(PassError, match=f"distance {distance} needs at least .* slots, there are {slots}"):
        Schedule(slots, distance)


def test_too_few_slots_for_what_is_in_use_at_once() -> None:
    spec = Spec(Residual(Mlp(8)), view=True)  # a block's view is read in the next one
    with pytest.raises(PassError, match="no slot is free; earlier segments are still in use. Use more slots than 1"):
        Schedule(1, 0)(staged(spec).graphs["stream"])


def test_a_graph_without_weights_needs_no_arena() -> None:
    model = Function(lambda m, x: (x * 2).relu())
    models = make_staged(model, (torch.randn(2, 8),))
    assert program(models.graphs["schedule"]).arena_bytes == 0
    module = squareq_fx.emit.emit(models.graphs["schedule"], model, models.slab)
    assert torch.equal(module(torch.ones(3, 8)), torch.full((3, 8), 2.0))


def test_it_needs_a_streamed_graph() -> None:
    models = staged(Spec(Residual(Mlp(8))))
    with pytest.raises(PassError, match="pass schedule needs a graph that is streamed, this one is outlined"):
        squareq_fx.run(models.graphs["outline"], [Schedule()])
