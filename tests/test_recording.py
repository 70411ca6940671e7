"""A recorded graph gives the graph's bits at every call, and nothing it was given or has given lies where it writes."""

from __future__ import annotations

import itertools
import operator
import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from backbones import calls
from compiled import LORA, compiled, emitted
from hypothesis import given
from hypothesis import strategies as st
from models import seeded
from recorders import PoisonRecorder, record, recordings
from runtime_support import make_store
from torch import fx, nn

import squareq_fx
from squareq_fx import CompiledModule, ops
from squareq_fx.emit import emit
from squareq_fx.errors import RuntimeStateError, SquareQError
from squareq_fx.ir import set_info
from squareq_fx.lowering import backends
from squareq_fx.lowering.lowered import lowered
from squareq_fx.recording.cuda_graphs import copy_into, memory_like
from squareq_fx.recording.pieces import plan
from squareq_fx.recording.recorded import Recorded, check_device, recorded
from squareq_fx.runtime import Runtime

BLOCKS, NBYTES, SLOTS, WIDTH = 4, 64, 3, 4


# ----------------------------------------------------------------------------------------------- any top-level graph


def _mix(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a * 0.5 + b.sin()).clamp(-9, 9)


def _two(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return a.cos() + b, (a - b).tanh()


def _turned(a: torch.Tensor) -> torch.Tensor:
    return a.flip(0).t().contiguous().t()


def _view(a: torch.Tensor) -> torch.Tensor:
    return torch.ops.aten.slice.Tensor(a, 1, 0, WIDTH)


def _weighted(weights: torch.Tensor, a: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    row = weights[:WIDTH]
    return a * row.view(torch.int8).float() * 0.01, row


def _by_row(row: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    return a + row.view(torch.int8).float()


def _by_size(a: torch.Tensor, n: int) -> torch.Tensor:
    return a + n


FUNCTIONS: dict[str, fx.GraphModule] = {
    name.strip("_"): fx.symbolic_trace(function)
    for name, function in globals().items()
    if name in ("_mix", "_two", "_turned", "_view", "_weighted", "_by_row", "_by_size")
}


class _Builder:
    """A top-level graph, one drawn act after the other; an act that cannot follow adds nothing."""

    def __init__(self) -> None:
        self.graph = fx.Graph()
        self.values = [self.graph.placeholder(name) for name in ("x", "y", "resident")]
        set_info(self.values[2], kind="weight", key="resident")
        number = self.graph.placeholder("number")
        self.values.append(self.graph.get_attr("constant"))
        self.numbers = [number]
        self.hosts: list[fx.Node] = []
        self.on_the_way: list[fx.Node] = []
        self.loaded: dict[int, tuple[fx.Node, int, list[fx.Node]]] = {}
        self.visits = 0

    def act(self, kind: str, i: int, j: int) -> None:
        a, b = self.values[i % len(self.values)], self.values[j % len(self.values)]
        if kind in ("mix", "turned", "view"):
            self.values.append(self.graph.call_module(kind, (a, b) if kind == "mix" else (a,)))
        elif kind == "two":
            both = self.graph.call_module("two", (a, b))
            self.values += [self.graph.call_function(operator.getitem, (both, k)) for k in (0, 1)]
        elif kind == "size":
            size = self.graph.call_function(torch.ops.aten.sym_size.int, (a, 0))
            self.numbers.append(self.graph.call_function(operator.mul, (size, self.numbers[j % len(self.numbers)])))
        elif kind == "by_size":
            self.values.append(self.graph.call_module("by_size", (a, self.numbers[j % len(self.numbers)])))
        elif kind == "load" and len(self.loaded) < SLOTS:
            self._load(i % BLOCKS, announced=bool(j % 2))
        elif kind == "weighted" and self.loaded:
            slot = sorted(self.loaded)[i % len(self.loaded)]
            both = self.graph.call_module("weighted", (self.loaded[slot][0], b))
            self.values.append(self.graph.call_function(operator.getitem, (both, 0)))
            self.loaded[slot][2].append(self.graph.call_function(operator.getitem, (both, 1)))
        elif kind == "by_row" and any(rows for _, _, rows in self.loaded.values()):
            rows = [row for _, _, rows in self.loaded.values() for row in rows]
            self.values.append(self.graph.call_module("by_row", (rows[i % len(rows)], b)))
        elif kind == "evict" and self.loaded:
            self._evict(sorted(self.loaded)[i % len(self.loaded)])
        elif kind == "offload":
            self.hosts.append(self.graph.call_function(ops.offload, (a,)))
        elif kind == "fetch" and self.hosts:
            host = self.hosts[i % len(self.hosts)]
            self.on_the_way.append(self.graph.call_function(ops.fetch, (host, torch.device("cpu"))))
        elif kind == "arrived" and self.on_the_way:
            self.values.append(self.graph.call_function(ops.arrived, (self.on_the_way.pop(0),)))

    def _load(self, block: int, announced: bool) -> None:
        slot = next(s for s in range(SLOTS) if s not in self.loaded)
        name, visit, self.visits = f"b{block}", self.visits, self.visits + 1
        place = {"visit": visit, "nbytes": NBYTES, "offset": 256 * slot}
        if announced:
            self.graph.call_function(ops.prefetch, (name,), place)
        node = self.graph.call_function(ops.load, (name,), {**place, "device": torch.device("cpu")})
        self.loaded[slot] = node, visit, []

    def _evict(self, slot: int) -> None:
        node, visit, _ = self.loaded.pop(slot)
        self.graph.call_function(ops.evict, (node, node.args[0], visit))

    def finish(self, chosen: Sequence[int]) -> fx.GraphModule:
        for slot in list(self.loaded):
            self._evict(slot)
        while self.on_the_way:
            self.act("arrived", 0, 0)
        everything = [*self.values, *self.numbers, *self.hosts]
        self.graph.output(tuple(everything[i % len(everything)] for i in chosen))
        root = nn.Module()
        for name, function in FUNCTIONS.items():
            root.add_module(name, function)
        root.register_buffer("constant", torch.linspace(-1, 1, WIDTH).expand(1, WIDTH))
        return fx.GraphModule(root, self.graph)


ACTS = ("mix", "two", "turned", "view", "size", "by_size", "load", "load", "weighted", "weighted", "by_row", "evict")
ACTS += ("offload", "fetch", "arrived")


def _graph(seed: int, acts: int) -> fx.GraphModule:
    draw, builder = random.Random(seed), _Builder()
    for _ in range(acts):
        builder.act(draw.choice(ACTS), draw.randrange(30), draw.randrange(30))
    return builder.finish([draw.randrange(30) for _ in range(draw.randint(1, 8))])


graphs = st.builds(_graph, st.integers(0, 2**32), st.integers(1, 60))
"""By a seed: what hypothesis draws act by act are mostly small changes of one graph."""


def _inputs(rows: int, layout: str, number: int, seed: int, resident: torch.Tensor) -> list[Any]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, WIDTH, generator=generator)
    y = torch.randn(1 if layout == "expanded" else rows, 2 * WIDTH, generator=generator)
    y = {"contiguous": y[:, :WIDTH].clone(), "gaps": y[:, ::2], "expanded": y[:, :WIDTH].expand(rows, WIDTH)}[layout]
    return [x, y, resident, number]


class _Runtime(Runtime):
    """Evicted bytes are overwritten; a copy to the host, which goes on beside later pieces, must not read from the pool."""

    pool: PoisonRecorder | None = None

    def offload(self, x: torch.Tensor) -> torch.Tensor:
        assert self.pool is None or not self.pool.holds(x)
        return super().offload(x if all(x.stride()) else x.contiguous())  # memory of its own takes no stride of 0


def _runtime(pool: PoisonRecorder | None = None) -> Runtime:
    runtime = _Runtime(make_store([NBYTES] * BLOCKS)[0], arena_bytes=256 * SLOTS, poison=True)
    runtime.pool = pool
    return runtime


def _step(runtime: Runtime, run: Callable[..., Any], inputs: Sequence[Any]) -> tuple[Any, ...]:
    with runtime.step(), ops.activate(runtime):
        return tuple(run(*inputs))


def _same(a: Any, b: Any) -> bool:
    return torch.equal(a, b) and a.stride() == b.stride() if isinstance(a, torch.Tensor) else type(a) is type(b) and a == b


def _copies(values: Sequence[Any]) -> list[Any]:
    return [v.clone() if isinstance(v, torch.Tensor) else v for v in values]


@given(
    gm=graphs,
    kinds=st.lists(
        st.tuples(st.sampled_from([1, 3, 5]), st.sampled_from(["contiguous", "gaps", "expanded"]), st.sampled_from([0, 2])),
        min_size=1,
        max_size=3,
        unique=True,
    ),
    order=st.lists(st.integers(0, 2), min_size=6, max_size=12),
    limit=st.integers(1, 3),
)
def test_every_call_gives_the_graphs_bits(gm: fx.GraphModule, kinds: list[Any], order: list[int], limit: int) -> None:
    recorder, resident = PoisonRecorder(), torch.randn(1, WIDTH)
    runtime = _runtime(recorder)
    run = recorded(gm, limit=limit, recorder=recorder)
    handed_out: list[tuple[tuple[Any, ...], tuple[Any, ...]]] = []
    for seed, which in enumerate(order):
        inputs = _inputs(*kinds[which % len(kinds)], seed, resident)
        before = _copies(inputs)
        expected = _step(runtime, gm, inputs)
        outputs = _step(runtime, run, inputs)
        assert all(map(_same, outputs, expected)), f"call {seed}"
        assert all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in zip(inputs, before))
        assert not any(recorder.holds(value) for value in outputs if isinstance(value, torch.Tensor))
        assert not recorder.live(), "something in the pool is kept between calls"
        handed_out.append((outputs, expected))
        assert len(recorder.graphs) == run.report().recordings * run.report().pieces
        assert run.report().recordings <= limit
    for outputs, expected in handed_out:
        assert all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in zip(outputs, expected))
    run.close()
    assert not recorder.graphs and not run.report().recordings
    runtime.shutdown()


@given(graphs)
def test_the_steps_are_the_graph(gm: fx.GraphModule) -> None:
    """Every node once, after what it reads; pieces as long as can be; nothing is read when it is dead."""
    steps = plan(gm).steps
    seen = {n for n in gm.graph.nodes if n.op in ("placeholder", "get_attr")}
    dead: set[fx.Node] = set()
    for step in steps:
        for node in step.nodes:
            assert set(node.all_input_nodes) <= seen and dead.isdisjoint(node.all_input_nodes)
            seen.add(node)
        dead.update(step.dead)
    output = next(n for n in gm.graph.nodes if n.op == "output")
    assert seen == {n for n in gm.graph.nodes if n.op != "output"} and dead.isdisjoint(output.all_input_nodes)
    assert sum(len(step.nodes) for step in steps) + len(plan(gm).inputs) + len(plan(gm).attributes) == len(seen)
    assert not any(a.kind == b.kind == "piece" for a, b in itertools.pairwise(steps))
    moving = [n for step in steps if step.kind == "move" for n in step.nodes[:1]]
    squareq = (ops.load, ops.evict, ops.prefetch, ops.offload, ops.fetch, ops.arrived)
    assert moving == [n for n in gm.graph.nodes if n.target in squareq]


# ------------------------------------------------------------------------------------------------------ real models


def _trainable(save: Any) -> CompiledModule:
    """A backbone ready to train, of the capture that all tests share; A and B are random, so that no gradient is zero."""
    one = compiled("flux")
    captured = next(stage.graph for stage in one.module.history if stage.name == "capture")
    graph = squareq_fx.run(captured, squareq_fx.default_passes(one.slab, lora=LORA, save=save))
    module = emit(graph, one.model, one.slab)
    with torch.no_grad(), seeded(3):
        for name, p in module.adapter_parameters().items():
            p.copy_(torch.randn(p.shape) * (0.05 if "lora_B" in name else p.shape[1] ** -0.5))
    return module


def _flat(module: Any, call: dict[str, Any]) -> list[torch.Tensor]:
    return module._binding.tensors((), call)[0]


@pytest.mark.parametrize("family", ["flux", "sdxl", "wan"])
@pytest.mark.parametrize("backing", ["host", "resident"])
def test_backbones_give_the_same_bits(family: str, backing: Any) -> None:
    module = emitted(family, "schedule", backing) if backing != "host" else compiled(family).module
    plain, recorder = lowered(module), PoisonRecorder(1 << 24)
    run = recorded(plain, recorder=recorder)
    for batch in (2, 1, 2, 2, 1, 1, 2):
        inputs = _flat(module, calls(family, batch))
        inputs = [x + 0.01 * torch.randn_like(x) if x.is_floating_point() and x.dim() > 1 else x for x in inputs]
        with torch.no_grad():
            expected, outputs = module._run(plain, inputs), module._run(run, inputs)
        assert all(map(torch.equal, outputs, expected)) and not any(map(recorder.holds, outputs))
    report = run.report()
    assert report.recordings == report.recorded == 2 and not report.dropped
    assert recorder.replays == 5 * report.pieces
    run.close()


def _gradients(module: Any, *outputs: torch.Tensor) -> list[torch.Tensor]:
    for output in outputs:
        output.square().mean().backward()
    found = [p.grad.clone() for p in module.adapter_parameters().values() if p.grad is not None]
    module.zero_grad(set_to_none=True)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("save", ["recompute", "save", "offload"])
def test_training_gives_the_same_gradients(save: Any) -> None:
    """Also with two forwards, or one without a backward, before a backward; and every update is seen."""
    module = _trainable(save)
    call, other = calls("flux", 2), calls("flux", 1)
    expected = [_gradients(module, module(**c).sample) for c in (call, other)]
    recorder = record(module, PoisonRecorder(1 << 25))
    for _ in range(4):
        for c, wanted in zip((call, other), expected):
            found = _gradients(module, module(**c).sample)
            assert found and len(found) == len(wanted) and all(map(torch.equal, found, wanted))
    _, forward, backward = (run.report() for run in recordings(module))
    assert forward.recordings == backward.recordings == 2
    assert recorder.replays == 2 * 3 * (forward.pieces + backward.pieces)
    outputs = [module(**c).sample for c in (call, other, call)]
    kept = outputs[0].detach().clone()
    with torch.no_grad():
        module(**call)
    for which, wanted in ((2, expected[0]), (1, expected[1]), (0, expected[0])):
        assert all(map(torch.equal, _gradients(module, outputs[which]), wanted))
    assert torch.equal(outputs[0], kept)
    optimizer = torch.optim.SGD(module.adapter_parameters().values(), lr=0.5)
    seen = [kept]
    for _ in range(2):
        module(**call).sample.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seen.append(module(**call).sample.detach())
    assert not any(torch.equal(a, b) for a, b in itertools.pairwise(seen))


@pytest.mark.parametrize("lora", [None, LORA])
def test_the_backend_that_compiles_nothing_is_eager_recorded(lora: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """`backend="eager+cudagraph"` as `compile` gives it, on a device of the tests that records."""
    recorders: list[PoisonRecorder] = []
    monkeypatch.setattr(backends, "check_device", lambda *a: None)
    monkeypatch.setattr(backends, "CudaRecorder", lambda device: recorders.append(PoisonRecorder(1 << 25)) or recorders[-1])
    one = compiled("flux")
    plain, module = (
        squareq_fx.compile(one.model, one.slab, lora=lora, backend=backend, cache=False, progress=False)  # type: ignore[arg-type]
        for backend in ("eager", "eager+cudagraph")
    )
    if lora is not None:
        with torch.no_grad(), seeded(3):
            for p, q in zip(plain.adapter_parameters().values(), module.adapter_parameters().values(), strict=True):
                q.copy_(p.normal_(std=0.1))
    for _ in range(3):
        for batch in (2, 1):
            outputs = [m(**calls("flux", batch)).sample for m in (plain, module)]
            assert torch.equal(*outputs)
            if lora is not None:
                first, second = (_gradients(m, output) for m, output in zip((plain, module), outputs, strict=True))
                assert first and all(map(torch.equal, first, second))
    (recorder,) = recorders
    assert recorder.replays > 0 and not module.lowering.compilations
    reports = [run.report() for run in recordings(module)]
    assert [r.recordings for r in reports] == ([2] if lora is None else [0, 2, 2])


# -------------------------------------------------------------------------------------- addresses, limits and errors


def _streamed() -> fx.GraphModule:
    builder = _Builder()
    for kind, i, j in (("mix", 0, 1), ("load", 0, 1), ("weighted", 0, 2), ("evict", 0, 0), ("mix", 1, 4), ("offload", 4, 0)):
        builder.act(kind, i, j)
    return builder.finish([5, 4, 0, 9])


def _calls(runtime: Runtime, run: Recorded, resident: torch.Tensor, times: int) -> None:
    for seed in range(times):
        inputs = _inputs(3, "contiguous", 1, seed, resident)
        assert all(map(_same, _step(runtime, run, inputs), _step(runtime, run._gm, inputs)))


def test_weights_that_moved_are_recorded_again() -> None:
    gm, resident = _streamed(), torch.randn(1, WIDTH)
    run, first, second = recorded(gm, recorder=PoisonRecorder()), _runtime(), _runtime()
    _calls(first, run, resident, 3)
    _calls(second, run, resident, 3)
    assert run.report().recorded == 2 and run.report().dropped == 1
    _calls(second, run, resident.clone(), 1)
    assert run.report().dropped == 2, "a resident weight has another address"
    with torch.no_grad():
        gm.constant = gm.constant.clone()
    kept = resident.clone()
    _calls(second, run, kept, 2)
    _calls(second, run, kept, 2)
    assert run.report().recordings == 1


def test_weights_that_never_lie_still_are_refused() -> None:
    gm = _streamed()
    for node in gm.graph.find_nodes(op="call_function", target=ops.load):
        node.kwargs = {**node.kwargs, "offset": None}
    for node in gm.graph.find_nodes(op="call_function", target=ops.prefetch):
        gm.graph.erase_node(node)
    gm.recompile()
    runtime, run, inputs = _runtime(), recorded(gm, recorder=PoisonRecorder()), _inputs(3, "gaps", 1, 0, torch.zeros(1, WIDTH))
    expected = _step(runtime, gm, inputs)
    assert runtime._device is not None
    engine, held = runtime._device.engine, []
    allocate = engine.allocate_for_copy

    def elsewhere(nbytes: int) -> torch.Tensor:
        held.append(allocate(nbytes))
        return held[-1]

    engine.allocate_for_copy = elsewhere  # type: ignore[method-assign]
    for _ in range(6):
        assert all(map(_same, _step(runtime, run, inputs), expected))
    with pytest.raises(RuntimeStateError, match="'b0' lies at another address at every call"):
        _step(runtime, run, inputs)


def test_the_least_recently_used_recording_goes() -> None:
    recorder, runtime, resident = PoisonRecorder(), _runtime(), torch.randn(1, WIDTH)
    run = recorded(_streamed(), limit=2, recorder=recorder)
    for rows in (1, 1, 3, 3, 1, 5, 5, 1):  # 3 goes, for 1 was used after it
        _step(runtime, run, _inputs(rows, "contiguous", 1, 0, resident))
    assert (run.report().recorded, run.report().dropped, recorder.prepared) == (3, 1, 3)
    _step(runtime, run, _inputs(3, "contiguous", 1, 0, resident))
    assert run.report().recorded == 4 and len(recorder.graphs) == 2 * run.report().pieces


def test_settings_that_choose_kernels_are_part_of_the_kind() -> None:
    runtime, resident = _runtime(), torch.randn(1, WIDTH)
    run = recorded(_streamed(), recorder=PoisonRecorder())
    _calls(runtime, run, resident, 2)
    torch.use_deterministic_algorithms(True)
    try:
        _calls(runtime, run, resident, 2)
    finally:
        torch.use_deterministic_algorithms(False)
    assert run.report().recordings == 2


def test_what_lies_on_another_device_is_not_recorded() -> None:
    """Attention leaves its seed on the host when it is not recorded, so a first backward gets one there."""
    recorder, runtime, resident = PoisonRecorder(), _runtime(), torch.randn(1, WIDTH)
    recorder.device = torch.device("cuda", 0)
    run = recorded(_streamed(), recorder=recorder)
    _calls(runtime, run, resident, 4)
    assert run.report().eager == 4 and not run.report().recorded
    recorder.device = torch.device("cpu")
    _calls(runtime, run, resident, 4)
    assert run.report().eager == 4 and run.report().recordings == 1


def test_numbers_are_part_of_the_kind() -> None:
    graph = fx.Graph()
    x, _, _, number = (graph.placeholder(name) for name in ("x", "y", "resident", "number"))
    size = graph.call_function(operator.add, (number, graph.call_function(torch.ops.aten.sym_size.int, (x, 0))))
    graph.output((graph.call_module("by_size", (x, size)), size))
    run = recorded(fx.GraphModule({"by_size": FUNCTIONS["by_size"]}, graph), recorder=PoisonRecorder())
    for number in (1, 2, 1, 2, 1, 2):
        inputs = _inputs(3, "gaps", number, 0, torch.zeros(1, WIDTH))
        assert all(map(_same, run(*inputs), (inputs[0] + (number + 3), number + 3)))
    assert run.report().recordings == 2


def test_a_piece_that_cannot_be_recorded_is_named() -> None:
    class Waiting(PoisonRecorder):
        def record(self, inputs: Any, sources: Any, run: Any) -> Any:
            if len(self.graphs) == 1:
                raise RuntimeError("operation not permitted when stream is capturing")
            return super().record(inputs, sources, run)

    recorder, runtime, inputs = Waiting(), _runtime(), _inputs(3, "contiguous", 1, 0, torch.zeros(1, WIDTH))
    run = recorded(_streamed(), recorder=recorder)
    _step(runtime, run, inputs)
    with pytest.raises(
        RuntimeStateError, match='weighted on the weights of b0 cannot be recorded.*backend="inductor".*capturing'
    ):
        _step(runtime, run, inputs)
    assert not recorder.graphs and not run.report().recordings


def test_only_cuda_devices_record() -> None:
    check_device("cuda:1")
    with pytest.raises(SquareQError, match='backend="cudagraph" records graphs of a CUDA device and cannot run on cpu'):
        check_device(torch.device("cpu"))
    runtime, run, inputs = _runtime(), recorded(_streamed()), _inputs(3, "contiguous", 1, 0, torch.zeros(1, WIDTH))
    _step(runtime, run, inputs)
    with pytest.raises(SquareQError, match="cudagraph"):
        _step(runtime, run, inputs)
    with pytest.raises(ValueError, match="limit is 0"):
        recorded(_streamed(), limit=0)


@given(st.data())
def test_a_copy_has_the_values_and_strides_of_any_tensor(data: st.DataObject) -> None:
    base = torch.randn(64)
    sizes = data.draw(st.lists(st.integers(0, 3), max_size=3))
    strides = data.draw(st.lists(st.integers(0, 8), min_size=len(sizes), max_size=len(sizes)))
    x = base.as_strided(sizes, strides, data.draw(st.integers(0, 7)))
    copy = memory_like(x)
    copy_into([copy], [x])
    assert torch.equal(copy, x) and copy.dtype == x.dtype
    assert copy.stride() == x.stride() or copy.is_contiguous()
    assert x.numel() == 0 or copy.untyped_storage().data_ptr() != base.untyped_storage().data_ptr()


@pytest.mark.parametrize("dtype", [torch.uint16, torch.uint32, torch.uint64])
def test_types_without_arithmetic_are_copied_too(dtype: torch.dtype) -> None:
    """Attention keeps its seed as uint64, of which torch has no copy of several tensors at once on CUDA."""
    source = torch.tensor([0, 1, 2**15 + 3], dtype=torch.int64).to(dtype)
    target = memory_like(source)
    copy_into([target], [source])
    assert target.dtype == dtype and target.tolist() == source.tolist()
