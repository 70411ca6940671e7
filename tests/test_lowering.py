"""What runs in place of a graph gives the graph's bits, follows its edits, and steps aside for a dispatch mode."""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
from backbones import calls
from compiled import compiled, emitted
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from squareq_fx import ops
from squareq_fx.ir import functions
from squareq_fx.lowering.lowered import Lowered, lowered, unpacker


def _targets(gm: torch.fx.GraphModule) -> set[Any]:
    own = {n.target for n in gm.graph.nodes if n.op == "call_function"}
    return own.union(*(_targets(child) for child in functions(gm).values()))


def test_a_lowered_graph_calls_no_operation_of_ours_that_computes() -> None:
    module = compiled("flux").module
    twin = lowered(module)
    assert {ops.int8_linear, ops.unpack} <= _targets(module)
    assert not {ops.int8_linear, ops.unpack} & _targets(twin)
    assert {ops.load, ops.evict} <= _targets(twin)
    for name, child in functions(twin).items():
        assert {n.name for n in functions(module)[name].graph.nodes} <= {n.name for n in child.graph.nodes}


def test_it_gives_the_same_bits_as_the_graph() -> None:
    for family in ("flux", "sdxl"):
        module, call = compiled(family).module, calls(family, 2)
        with torch.no_grad():
            expected = module(**call).sample
            with _Seen() as seen:
                assert torch.equal(module(**call).sample, expected)
        assert ops.int8_linear in seen.operations, "under a dispatch mode the graph itself runs"


class _Seen(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.operations: set[Any] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operations.add(func)
        return func(*args, **(kwargs or {}))


def test_an_edit_of_the_graph_or_a_function_takes_effect() -> None:
    module = emitted("sd15", "schedule", "host")
    call = calls("sd15", 1)
    with torch.no_grad():
        expected = module(**call).sample
    name, function = next((n, f) for n, f in functions(module).items() if n.startswith("epilogue"))
    output = next(n for n in function.graph.nodes if n.op == "output")
    result = output.args[0]
    with function.graph.inserting_before(output):
        doubled = function.graph.call_function(torch.ops.aten.mul.Tensor, (result, 2))
    output.args = (doubled,)
    function.recompile()
    with torch.no_grad():
        assert torch.equal(module(**call).sample, expected * 2), name
    output.args = (result,)
    function.graph.erase_node(doubled)
    function.recompile()
    with torch.no_grad():
        assert torch.equal(module(**call).sample, expected)


class _Twin:
    def __init__(self, gm: torch.fx.GraphModule) -> None:
        self.run, self.closed = lowered(gm), 0

    def __call__(self, *arguments: Any) -> Any:
        return self.run(*arguments)

    def close(self) -> None:
        self.closed += 1


def test_a_twin_is_closed_when_another_takes_its_place() -> None:
    graph = torch.fx.symbolic_trace(lambda x: x + 1)
    made: list[_Twin] = []
    one = Lowered(graph, make=lambda gm: made.append(_Twin(gm)) or made[-1])  # type: ignore[func-returns-value]
    assert one(1) == one(2) - 1 == 2 and len(made) == 1
    (node,) = graph.graph.find_nodes(op="call_function", target=operator.add)
    node.args = (node.args[0], 5)
    graph.recompile()
    assert one(1) == 6 and [twin.closed for twin in made] == [1, 0]
    one.close()
    one.close()
    assert [twin.closed for twin in made] == [1, 1]


@given(
    pieces=st.lists(
        st.tuples(st.sampled_from([torch.int8, torch.float32, torch.bfloat16]), st.lists(st.integers(0, 4), max_size=3)),
        min_size=1,
        max_size=6,
    ),
    start=st.sampled_from([0, 256]),
    odd=st.integers(0, 3),
)
def test_all_views_at_once_are_those_of_unpack(pieces: list[tuple[torch.dtype, list[int]]], start: int, odd: int) -> None:
    placed, offset = [], 0
    for dtype, size in pieces:
        offset = -(-offset // dtype.itemsize) * dtype.itemsize
        placed.append((offset, size, dtype))
        offset += math.prod(size) * dtype.itemsize
    arena = torch.randint(0, 255, (start + offset + odd,), dtype=torch.uint8)
    weights = arena[start:]
    for view, (at, size, dtype) in zip(unpacker(placed)(weights), placed, strict=True):
        expected = ops.unpack(weights, at, size, dtype)
        assert view.dtype == dtype and view.shape == expected.shape and view.stride() == expected.stride()
        assert torch.equal(view.reshape(-1).view(torch.uint8), expected.reshape(-1).view(torch.uint8))
        assert not view.numel() or view.data_ptr() == expected.data_ptr()
