"""stream: each segment is one flat buffer, loaded before its call and evicted after its last use."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import laws
import pytest
import torch
from hypothesis import example, given
from models import EXAMPLES, SIZES, Function, Mlp, Residual, Spec, few, make_staged, specs, staged
from torch import fx, nn

import squareq_fx
from squareq_fx import ops
from squareq_fx.errors import PassError
from squareq_fx.ir import Level, clone, functions, info, program, set_info, weight_inputs
from squareq_fx.passes import Stream
from squareq_fx.slab import segment_layout


@few
@given(specs())
@example(EXAMPLES[0])
@example(EXAMPLES[1])
@example(EXAMPLES[2])
@example(EXAMPLES[3])
def test_laws(spec: Spec) -> None:
    models = staged(spec)
    before = models.graphs["outline"]
    after = laws.apply(Stream(), before, models)
    assert program(after).level == Level.STREAMED
    assert_layout(after)
    assert_visits(after)
    for sizes in SIZES:
        call = spec.inputs(*sizes)
        found = laws.evaluate(after, models, call)  # laws.Replay holds every read against the loads and evicts
        assert laws.same(found, laws.evaluate(before, models, call))
        assert laws.same(laws.printed(after, models, call), found)


@few
@given(specs())
@example(EXAMPLES[1])
def test_float_weights_stream_too(spec: Spec) -> None:
    models = staged(spec)
    flat = squareq_fx.passes.Outline()(models.graphs["canonicalize"])
    after = laws.apply(Stream(), flat, models)
    assert laws.same(laws.evaluate(after, models, spec.inputs()), laws.eager(models.model, spec.inputs()))


def loads(gm: fx.GraphModule) -> list[fx.Node]:
    return [n for n in gm.graph.nodes if n.target is ops.load]


def assert_layout(gm: fx.GraphModule) -> None:
    """One layout: the program's segments, the functions' views and `segment_layout` say the same, aligned and gapless."""
    segments = program(gm).segments
    assert set(segments) == {str(n.args[0]) for n in loads(gm)}
    for name, packed in segments.items():
        assert segment_layout([(p.key, p.nbytes) for p in packed]) == [(p.key, p.offset) for p in packed]
        assert all(p.offset % p.dtype.itemsize == 0 for p in packed if p.nbytes)
        total = sum(p.nbytes for p in packed)
        for load in (n for n in loads(gm) if n.args[0] == name):
            assert load.kwargs["nbytes"] == total and load.meta["val"].shape == (total,)
            (call,) = (u for u in load.users if u.op == "call_module")
            function = functions(gm)[call.target]
            views = [n for n in function.graph.nodes if n.target is ops.unpack]
            assert [(v.args[1], v.args[3]) for v in views] == [(p.offset, p.dtype) for p in packed]
            assert call.args[0] is load and info(call).key == name
            assert [n for n in function.graph.nodes if n.op == "placeholder" and info(n).kind == "weight"] == [views[0].args[0]]


def assert_visits(gm: fx.GraphModule) -> None:
    seen: dict[str, int] = {}
    for load in loads(gm):
        block = str(load.args[0])
        assert load.kwargs["visit"] == seen.get(block, 0) and load.kwargs["offset"] is None
        seen[block] = seen.get(block, 0) + 1


class Layer(nn.Module):
    """Computes, and does something more with a parameter of its own."""

    def __init__(self, more: Callable[[nn.Module, torch.Tensor], Any]) -> None:
        super().__init__()
        self.a, self.b, self.table = nn.Linear(8, 8), nn.Linear(8, 8), nn.Parameter(torch.randn(4, 8))
        self.more = more

    def forward(self, x: torch.Tensor) -> Any:
        return self.more(self, self.b(self.a(x)))


def streamed(body: Callable[..., Any], more: Callable[..., Any] = lambda m, x: x, **state: Any) -> fx.GraphModule:
    """A model of three blocks, streamed, replayed and compared with the outlined graph and the dequantised model."""
    model = Function(body, layers=nn.ModuleList([Layer(more) for _ in range(3)]), **state)
    x = torch.randn(2, 8)
    models = make_staged(model, (x,), until="outline")
    after = laws.apply(Stream(), models.graphs["outline"], models)
    found = laws.evaluate(after, models, {"x": x})
    assert laws.same(found, laws.evaluate(models.graphs["outline"], models, {"x": x}))
    assert all(laws.l2(a, b) < 1e-5 for a, b in zip(found, laws.eager(models.dequantized, (x,)), strict=True))
    return after


def sequence(gm: fx.GraphModule) -> list[str]:
    """loads, calls and evicts in order, as a reader sees them"""
    short = {ops.load: "load", ops.evict: "evict"}
    return [
        f"{short[n.target]} {n.args[0] if n.target is ops.load else n.args[1]}" if n.target in short else n.name
        for n in gm.graph.nodes
        if n.op in ("call_module", "call_function") and "getitem" not in str(n.target)
    ]


def run_all(m: Any, x: torch.Tensor) -> torch.Tensor:
    for layer in m.layers:
        x = layer(x)
    return x


def test_a_block_is_there_for_its_call_alone() -> None:
    after = streamed(run_all)
    assert sequence(after) == [
        *("load layers.0", "layers_0", "evict layers.0"),
        *("load layers.1", "layers_1", "evict layers.1"),
        *("load layers.2", "layers_2", "evict layers.2"),
    ]
    assert [n.name for n in loads(after)] == ["load_layers_0", "load_layers_1", "load_layers_2"]
    assert weight_inputs(after) == {}


def test_a_second_visit_is_a_second_load() -> None:
    after = streamed(lambda m, x: run_all(m, run_all(m, x)))
    assert [n.name for n in loads(after)][3:] == ["load_layers_0_v1", "load_layers_1_v1", "load_layers_2_v1"]
    assert [n.kwargs["visit"] for n in loads(after)] == [0, 0, 0, 1, 1, 1]
    assert len(program(after).segments) == 3


VIEWS: dict[str, Callable[..., torch.Tensor]] = {
    "slice": lambda m, x: m.table[1:3],
    "select_of_transpose": lambda m, x: m.table.t().select(0, 2).expand(8, 4).t(),
    "chunk": lambda m, x: m.table.chunk(2)[1],
    "unbind": lambda m, x: m.table.unbind(0)[2],
    "reshape": lambda m, x: m.table.reshape(-1)[4:12],
    "broadcast": lambda m, x: torch.broadcast_tensors(m.table[0], x)[0],
    "einsum": lambda m, x: torch.einsum("ij->ji", m.table).t(),
    "meshgrid": lambda m, x: torch.meshgrid(m.table[0], m.table[1], indexing="ij")[0],
    "atleast": lambda m, x: torch.atleast_2d(m.table[0]),
    "same_cast": lambda m, x: m.table[1:].to(torch.float32),
    "view_as": lambda m, x: m.table.view_as(m.table),
    "movedim": lambda m, x: torch.movedim(m.table, 0, 1).mT,
    "unflatten": lambda m, x: m.table.unflatten(1, (2, 4)).flatten(1),
    "real": lambda m, x: torch.real(m.table),
    "unfold": lambda m, x: m.table.unfold(0, 2, 2)[0].t(),
    "diagonal": lambda m, x: torch.diagonal(m.table).expand(2, 4).repeat_interleave(2, 1),
    "narrow": lambda m, x: torch.narrow(m.table, 0, 1, 2),
    "tensor_split": lambda m, x: torch.tensor_split(m.table, 3)[0],
    "squeeze": lambda m, x: m.table[:1].squeeze(0).unsqueeze(0),
    "as_strided": lambda m, x: m.table.as_strided((2, 8), (8, 1)),
    "ravel": lambda m, x: m.table.ravel()[:8],
    "hsplit": lambda m, x: torch.hsplit(m.table, 2)[0].repeat(1, 2),
    "swapaxes": lambda m, x: torch.swapaxes(m.table, 0, 1).T,
    "unsafe_chunk": lambda m, x: torch.unsafe_chunk(m.table, 2)[0],
    "unsafe_split": lambda m, x: torch.unsafe_split(m.table, 2)[0],
    "dropout": lambda m, x: torch.dropout(m.table[1:], 0.5, False),
    "contiguous": lambda m, x: m.table[1:].contiguous(),
    "type_as": lambda m, x: m.table[1:].type_as(x),
    "expand_as": lambda m, x: m.table[0].expand_as(x),
    "pad": lambda m, x: torch.nn.functional.pad(m.table, (0, 0)),
    "view_of_bytes": lambda m, x: m.table.view(torch.int32).view(torch.float32),
    "detach": lambda m, x: m.table[1:].detach(),
}


@pytest.mark.parametrize("kind", VIEWS)
def test_a_view_that_a_block_hands_on_keeps_the_block_there(kind: str) -> None:
    """The view is read after the next block, so the first may not be evicted before that. laws.Replay would see it."""

    def body(m: Any, x: torch.Tensor) -> torch.Tensor:
        x, view = m.layers[0](x)
        x, _ = m.layers[1](x)
        return m.layers[2](x)[0] + (view * 2).sum()

    after = streamed(body, more=lambda m, x: (x, VIEWS[kind](m, x)))
    order = sequence(after)
    assert any(p.key == "layers.0.table" for p in program(after).segments["layers.0"])
    if kind != "broadcast":  # which of its outputs is a view of which input is not looked at
        assert order.index("evict layers.1") < order.index("load layers.2")


def test_the_evict_comes_right_after_the_last_reader_of_a_view() -> None:
    def body(m: Any, x: torch.Tensor) -> torch.Tensor:
        x, view = m.layers[0](x)
        x = m.layers[1](x)[0] + view
        return m.layers[2](x)[0]

    order = sequence(streamed(body, more=lambda m, x: (x, m.table[1:2])))
    assert order[:6] == ["load layers.0", "layers_0", "load layers.1", "layers_1", "evict layers.1", "add"]
    assert order[6] == "evict layers.0"


def test_a_view_that_goes_through_another_block() -> None:
    """layers.1 returns what it was given: a view of layers.0's weights."""

    class Passing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.table = nn.Linear(8, 8), nn.Linear(8, 8), nn.Parameter(torch.randn(4, 8))

        def forward(self, x: torch.Tensor, view: torch.Tensor) -> Any:
            return self.b(self.a(x)) + view.sum(), view[:1]

    def body(m: Any, x: torch.Tensor) -> torch.Tensor:
        x, view = m.layers[0](x)
        x, view = m.passing[0](x, view)
        x, view = m.passing[1](x, view)
        return m.layers[2](x)[0] * view

    after = streamed(body, more=lambda m, x: (x, m.table[2:]), passing=nn.ModuleList([Passing(), Passing()]))
    order = sequence(after)
    assert order.index("mul") + 1 == order.index("evict layers.0")


@pytest.mark.parametrize("returned", [lambda m, x: m.table[1:], lambda m, x: m.table.t(), lambda m, x: m.a.bias[None]])
def test_a_model_that_returns_a_view_of_streamed_weights_is_refused(returned: Callable[..., Any]) -> None:
    model = Function(
        lambda m, x: m.layers[1](m.layers[0](x)[0]),
        layers=nn.ModuleList([Layer(lambda m, x: (x, returned(m, x))) for _ in range(2)]),
    )
    with pytest.raises(PassError, match=r"pass stream: the model returns a view of the weights of 'layers.1'"):
        make_staged(model, (torch.randn(2, 8),))


def test_a_copy_of_streamed_weights_may_be_returned() -> None:
    def body(m: Any, x: torch.Tensor) -> Any:
        return m.layers[2](m.layers[0](x)[0])

    streamed(body, more=lambda m, x: (x, m.table.clone()))


def test_weights_read_outside_any_function_stay_resident() -> None:
    after = streamed(lambda m, x: (run_all(m, x), m.free), free=torch.randn(5))
    assert list(weight_inputs(after)) == ["free"]


def test_odd_sizes_and_mixed_dtypes_are_aligned_and_exact() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(7, 3), nn.Linear(3, 7, bias=False)
            self.small = nn.Parameter(torch.randn(5).half())
            self.register_buffer("flag", torch.tensor([True, False, True]))
            self.register_buffer("wide", torch.tensor([1.0, 2.0], dtype=torch.float64))
            self.register_buffer("none", torch.empty(0))
            self.register_buffer("scalar", torch.tensor(3, dtype=torch.int32))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            hidden = self.a(x) * self.flag * self.scalar
            return self.b(hidden) + self.small.float().sum() + self.wide.sum().float() + self.none.sum()

    model = Function(lambda m, x: m.layers[1](m.layers[0](x)), layers=nn.ModuleList([Odd(), Odd()]))
    x = torch.randn(3, 7)
    models = make_staged(model, (x,))
    assert_layout(models.graphs["stream"])
    for stage in ("stream", "schedule"):
        found = laws.evaluate(models.graphs[stage], models, {"x": x})
        assert laws.same(found, laws.evaluate(models.graphs["quantize"], models, {"x": x}))
    module = squareq_fx.emit.emit(models.graphs["schedule"], model, models.slab)
    assert laws.same(laws.eager(module, (x,)), found)


def test_in_the_slab_a_block_is_one_range_of_these_very_bytes() -> None:
    spec = EXAMPLES[0]
    models = staged(spec)
    for segment in models.slab.segments:
        packed = program(models.graphs["stream"]).segments.get(segment.name)
        if segment.name.startswith("blocks."):
            assert packed is not None and tuple(p.key for p in packed) == segment.tensors
            assert [segment.offset + p.offset for p in packed] == [models.slab.tensors[p.key].offset for p in packed]


def test_it_needs_an_outlined_graph() -> None:
    models = staged(Spec(Residual(Mlp(8))))
    with pytest.raises(PassError, match="pass stream needs a graph that is outlined, this one is quantized"):
        squareq_fx.run(models.graphs["quantize"], [Stream()])


def test_two_calls_of_one_name_with_other_weights_are_refused() -> None:
    models = staged(EXAMPLES[0])
    broken = clone(models.graphs["outline"])
    first, second = (n for n in broken.graph.nodes if n.op == "call_module" and info(n).key in ("blocks.0", "blocks.1"))
    set_info(second, key=info(first).key)
    with pytest.raises(PassError, match="two calls are both named 'blocks.0' but read different weights"):
        Stream()(broken)


def test_weights_out_of_layout_order_are_refused() -> None:
    broken = clone(staged(EXAMPLES[0]).graphs["outline"])
    call = next(n for n in broken.graph.nodes if n.op == "call_module" and info(n).key == "blocks.0")
    call.args = (call.args[1], call.args[0], *call.args[2:])
    with pytest.raises(PassError, match="not in layout order"):
        Stream()(broken)
