"""Blocks traced once: the graph is the one that tracing each of them gives, and what only looks equal is traced by itself."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from backbones import backbone
from models import make_slab
from torch import fx, nn

import squareq_fx
from squareq_fx.emit import emit
from squareq_fx.ir import info, program
from squareq_fx.specs import spec
from squareq_fx.tracing.export import Skeleton

WIDTH = 8

class Runs:
    """How many blocks ran; told by no block's own attributes."""

    count = 0


RUNS = Runs()
STEPS = {"block": 0}
Body = Callable[..., Any]


class Block(nn.Module):
    steps = 0

    def __init__(self, body: Body) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.body = body

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        RUNS.count += 1
        return self.body(self, *args, **kwargs)


class Net(nn.Module):
    """Four blocks of one body; `walk` calls them."""

    def __init__(self, body: Body, walk: Callable[[Any, torch.Tensor], torch.Tensor], change: Callable[[Any], None]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(body) for _ in range(4))
        self.stem, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.walk = walk
        change(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.walk(self, self.stem(x)))


def in_turn(net: Any, x: torch.Tensor) -> torch.Tensor:
    for block in net.blocks:
        x = block(x)
    return x


def nothing(net: Any) -> None:
    pass


def plain(block: Any, x: torch.Tensor) -> torch.Tensor:
    return x + block.two(torch.relu(block.one(x)))


def check(body: Body, walk: Any = in_turn, change: Any = nothing) -> int:
    """The captured module computes what the model does, at sizes it was not captured with too; how many blocks one run of the
    traced forward ran."""
    torch.manual_seed(0)
    model = Net(body, walk, change).eval().requires_grad_(False)
    seen: list[int] = []
    original = Net.forward

    def forward(self: Net, x: torch.Tensor) -> torch.Tensor:
        before = RUNS.count
        try:
            return original(self, x)
        finally:
            seen.append(RUNS.count - before)

    Net.forward = forward  # type: ignore[method-assign]
    try:
        graph = squareq_fx.capture(model, (torch.randn(2, 6, WIDTH),))
    finally:
        Net.forward = original  # type: ignore[method-assign]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = emit(graph, model, make_slab(model))
    for sizes in ((2, 6), (3, 4)):
        x = torch.randn(*sizes, WIDTH)
        with torch.no_grad():
            assert torch.equal(module(x.clone()), model(x.clone()))
    return seen[-1]


def test_equal_blocks_are_traced_once() -> None:
    assert check(plain) == 1


def test_several_results_views_of_one_tensor_nothing_and_what_was_given() -> None:
    def body(block: Any, x: torch.Tensor, y: torch.Tensor, *, on: bool, without: None = None) -> Any:
        both = block.two(torch.cat((x, block.one(y)), dim=1))
        return {"x": both[:, : x.shape[1]], "y": both[:, x.shape[1] :], "same": x, "none": None}

    def walk(net: Any, x: torch.Tensor) -> torch.Tensor:
        y = 2 * x
        total = x
        for block in net.blocks:
            made = block(x, y, on=True)
            assert made["none"] is None
            total = total + made["same"]
            x, y = made["x"], made["y"]
        return total + x + y

    assert check(body, walk) == 2  # the first is given whole tensors, the others parts, which lie otherwise


def test_one_tensor_given_twice_is_told_from_two() -> None:
    def body(block: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return block.two(block.one(x)) if x is y else block.one(x) - block.two(y)

    def walk(net: Any, x: torch.Tensor) -> torch.Tensor:
        x = net.blocks[0](x, x) + net.blocks[1](x, x)
        return net.blocks[2](x, 2 * x) + net.blocks[3](x, 2 * x)

    assert check(body, walk) == 2


@pytest.mark.parametrize("flags", [(True, True, False, False), (1, True, 1.0, "1"), (None, 0, False, 0.0)], ids=str)
def test_other_arguments_are_another_program(flags: tuple[Any, ...]) -> None:
    def body(block: Any, x: torch.Tensor, flag: Any) -> torch.Tensor:
        return block.two(block.one(x) + len(repr(flag)))

    def walk(net: Any, x: torch.Tensor) -> torch.Tensor:
        for block, flag in zip(net.blocks, flags):
            x = block(x, flag)
        return x

    assert check(body, walk) == len({repr(flag) for flag in flags})


def test_other_sizes_are_another_program_also_of_the_block_that_was_traced() -> None:
    """The first block is traced for two sizes; what copies of it are made of is told by the call, not by the block."""

    def body(block: Any, x: torch.Tensor) -> torch.Tensor:
        return block.two(block.one(x) * x.shape[1])

    def walk(net: Any, x: torch.Tensor) -> torch.Tensor:
        first, second, third, fourth = net.blocks
        long = torch.cat((x, x), dim=1)
        a, b = first(x), first(long)
        return second(a) + fourth(third(x)) + second(b)[:, : x.shape[1]]

    assert check(body, walk) == 2


def test_a_block_that_runs_twice() -> None:
    def walk(net: Any, x: torch.Tensor) -> torch.Tensor:
        for block in [*net.blocks, net.blocks[1], net.blocks[0]]:
            x = block(x)
        return x

    assert check(plain, walk) == 1


class Counter:
    def __init__(self) -> None:
        self.count = 0


def _counted(block: Any) -> int:
    block.counter.count += 1
    return block.counter.count


def _counted_by_class(block: Any) -> int:
    type(block).steps += 1
    return type(block).steps


def _counted_beside(block: Any) -> int:
    STEPS["block"] += 1
    return STEPS["block"]


def _toggled(block: Any) -> int:
    block.counter.count = 1 - block.counter.count
    return block.counter.count


@pytest.mark.parametrize("count", [_counted, _toggled, _counted_by_class, _counted_beside])
def test_blocks_that_count_are_traced_each(count: Callable[[Any], int]) -> None:
    def body(block: Any, x: torch.Tensor) -> torch.Tensor:
        return block.two(block.one(x)) * (1 + count(block) % 4)

    def change(net: Any) -> None:
        counter = Counter()
        for block in net.blocks:
            block.counter = counter

    Block.steps = STEPS["block"] = 0
    assert check(body, change=change) == 4


@pytest.mark.parametrize("where", ["the block", "its class"])
def test_what_the_model_changes_between_its_blocks(where: str) -> None:
    def body(block: Any, x: torch.Tensor) -> torch.Tensor:
        return block.two(block.one(x)) * (1 + block.steps)

    def walk(net: Any, x: torch.Tensor) -> torch.Tensor:
        for i, block in enumerate(net.blocks):
            (block if where == "the block" else Block).steps = i // 2
            x = block(x)
        return x

    Block.steps = 0
    assert check(body, walk) == 2


def test_attributes_tell_blocks_apart() -> None:
    def body(block: Any, x: torch.Tensor) -> torch.Tensor:
        return block.two(block.one(x)) * block.factor

    def change(net: Any) -> None:
        for i, block in enumerate(net.blocks):
            block.factor = 1.0 + i // 2

    assert check(body, change=change) == 2


def test_tensors_that_are_plain_attributes_keep_their_values() -> None:
    def body(block: Any, x: torch.Tensor) -> torch.Tensor:
        return block.two(block.one(x)) * block.table

    def change(net: Any) -> None:
        for i, block in enumerate(net.blocks):
            block.table = torch.full((WIDTH,), 1.0 + i)

    check(body, change=change)


def test_buffers_and_constants() -> None:
    def body(block: Any, x: torch.Tensor) -> torch.Tensor:
        return block.two(block.one(x)) * block.gain + torch.tensor([0.5], dtype=x.dtype)

    def change(net: Any) -> None:
        for i, block in enumerate(net.blocks):
            block.register_buffer("gain", torch.full((WIDTH,), 1.0 + i))

    assert check(body, change=change) == 1


@pytest.mark.parametrize("inside", [True, False], ids=["by two blocks", "by a block and the head"])
def test_shared_weights(inside: bool) -> None:
    def change(net: Any) -> None:
        owner = net.blocks[2].one if inside else net.head
        owner.weight = net.blocks[0].two.weight

    check(plain, change=change)


@pytest.mark.parametrize("returned", [True, False])
def test_a_block_that_writes_into_what_it_is_given(returned: bool) -> None:
    def body(block: Any, x: torch.Tensor) -> torch.Tensor:
        x.add_(block.two(block.one(x)))
        return x if returned else block.one(x)

    def walk(net: Any, x: torch.Tensor) -> torch.Tensor:
        x = x + 1
        total = x * 0
        for block in net.blocks:
            total = total + block(x)
        return total + x

    assert check(body, walk) == 4


def test_a_model_that_writes_into_what_a_block_returned() -> None:
    def body(block: Any, x: torch.Tensor) -> torch.Tensor:
        block.one(x)
        return x[:, 1:]

    def walk(net: Any, x: torch.Tensor) -> torch.Tensor:
        x = x + 1
        for block in net.blocks:
            part = block(x)
            part *= 2
        return x

    assert check(body, walk) == 4


def test_a_shortcut_that_fails_takes_no_batch_away() -> None:
    """From an example of batch 1, which is widened: nothing warns, and the graph takes any batch."""

    def body(block: Any, x: torch.Tensor) -> torch.Tensor:
        x.add_(block.two(block.one(x)))
        return x

    model = Net(body, lambda net, x: in_turn(net, x + 1), nothing).eval().requires_grad_(False)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        graph = squareq_fx.capture(model, (torch.randn(1, 6, WIDTH),))
    assert not [str(w.message) for w in warned if "batch" in str(w.message)]
    assert "s" in str(next(n.meta["val"].shape[0] for n in graph.graph.nodes if info(n).kind == "input"))


def _told(graph: fx.GraphModule) -> list[tuple[Any, ...]]:
    number = {node: f"%{i}" for i, node in enumerate(graph.graph.nodes)}

    def text(value: Any) -> str:
        return str(fx.node.map_aggregate(value, lambda leaf: number.get(leaf, leaf) if isinstance(leaf, fx.Node) else leaf))

    rows: list[tuple[Any, ...]] = []
    for node in graph.graph.nodes:
        stack = [(key, path) for key, (path, _) in (node.meta.get("nn_module_stack") or {}).items()]
        lines = [line for line in str(node.meta.get("stack_trace")).splitlines() if "squareq_fx/tracing" not in line]
        lines = [line for line in lines if "forward(*args, **kwargs)" not in line]
        named = (node.op, str(node.target), text(node.args), text(node.kwargs), info(node))
        rows.append((*named, spec(node.meta.get("val")), stack, "\n".join(lines)))
    return rows


@pytest.mark.parametrize("family", ["flux", "flux2", "sdxl", "wan"])
def test_the_graph_is_that_of_tracing_each_block(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every node, in order: operation, arguments, type, record, modules and source."""
    model = backbone(family)
    found: list[bool] = []
    original = Skeleton.trace_once

    def noted(self: Skeleton, *args: Any) -> bool:
        found.append(original(self, *args))
        return found[-1]

    monkeypatch.setattr(Skeleton, "trace_once", noted)
    once = squareq_fx.capture(model)
    assert found == [True], "there are equal blocks, and tracing them once went well"
    monkeypatch.setattr(Skeleton, "trace_once", lambda self, *args: False)
    each = squareq_fx.capture(model)
    assert set(program(once).guards) == set(program(each).guards)
    assert program(once).constants.keys() == program(each).constants.keys()
    for a, b in zip(_told(once), _told(each), strict=True):
        assert a == b
