"""CUDA graphs on a card: the bits of the same kernels started one by one, whatever the pool's memory is used for in between."""

from __future__ import annotations

import copy
import functools
import gc
import itertools
from typing import Any

import pytest
import torch
from backbones import backbone, calls
from models import make_slab
from recorders import record, recordings
from test_gpu_end_to_end import on_card
from test_gpu_training import SIZES, graph, inputs, loss_of, model_and_slab, module_of
from test_gpu_training import deterministic as deterministic
from torch import fx, nn

import squareq_fx
from squareq_fx import CompiledModule, ops
from squareq_fx.emit import emit
from squareq_fx.errors import RuntimeStateError
from squareq_fx.recording.cuda_graphs import CudaRecorder
from squareq_fx.recording.recorded import recorded
from squareq_fx.runtime import Runtime

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]

KINDS = ((1, 3, 5), (2, 4, 4), (1, 5, 6))


@functools.cache
def scheduled(family: str) -> tuple[fx.GraphModule, nn.Module, squareq_fx.Slab]:
    model = copy.deepcopy(backbone(family)).to("cuda", torch.bfloat16)
    slab = make_slab(model)
    captured = squareq_fx.capture(model, slab=slab)
    return squareq_fx.run(captured, squareq_fx.default_passes(slab)), model, slab


def poisoned(module: CompiledModule) -> CompiledModule:
    """Evicted bytes become 0xAB at once."""
    one = module.runtime
    assert one is not None
    module.runtime = Runtime(one.store, device=one.device, arena_bytes=one.arena_bytes, poison=True)
    return module


def varied(call: dict[str, Any], seed: int) -> dict[str, Any]:
    """The same call with other latents: what a replay must see."""
    generator = torch.Generator("cuda").manual_seed(seed)
    latents = next(name for name in ("hidden_states", "sample") if name in call)
    noise = torch.randn(call[latents].shape, device="cuda", generator=generator, dtype=torch.float32)
    return {**call, latents: noise.to(call[latents].dtype)}


@pytest.mark.parametrize("backing", ["host", "resident", "disk"])
@pytest.mark.parametrize("family", ["flux", "sdxl"])
def test_recorded_is_eager(family: str, backing: Any) -> None:
    """Three kinds of call mixed, with two recordings to keep; each call new numbers, each output held and then overwritten."""
    plain, module = (poisoned(emit(*scheduled(family), backing=backing)) for _ in range(2))
    recorder = record(module, CudaRecorder("cuda"), limit=2)
    held = []
    with torch.no_grad():
        for step, kind in enumerate((0, 0, 0, 1, 1, 0, 1, 2, 2, 2, 0, 0, 0, 1)):
            call = varied(on_card(calls(family, *KINDS[kind]), torch.bfloat16), step)
            expected, output = plain(**call).sample, module(**call).sample
            assert torch.equal(output, expected), f"call {step}: {kind}"
            held.append((output, expected))
    assert all(torch.equal(output, expected) for output, expected in held), "an output was overwritten by a later call"
    report = recordings(module)[0].report()
    print(family, backing, report)
    assert report.recordings == 2 and report.dropped >= 1 and report.pieces > 1
    assert report.nbytes is not None and report.nbytes > 0
    recordings(module)[0].close()
    assert recorder.nbytes() == 0
    plain.shutdown()
    module.shutdown()


def gradients_of(module: CompiledModule, call: dict[str, Any]) -> dict[str, torch.Tensor]:
    loss_of(module(**call).sample).backward()
    return taken(module)


def taken(module: CompiledModule) -> dict[str, torch.Tensor]:
    found = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
    module.zero_grad(set_to_none=True)
    return found


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], what: Any) -> None:
    assert found and found.keys() == expected.keys()
    different = [name for name in expected if not torch.equal(found[name], expected[name])]
    assert not different, (what, different[:3], len(different))


@pytest.mark.parametrize(
    ("family", "save", "backing"),
    [
        ("flux", "recompute", "host"),
        ("flux", "recompute", "resident"),
        ("flux", "save", "host"),
        ("flux", "offload", "host"),
        ("sdxl", "recompute", "host"),
        ("sdxl", "offload", "disk"),
    ],
)
def test_gradients_are_those_without_recordings(family: str, save: str, backing: Any, deterministic: None) -> None:
    plain, module = (poisoned(module_of(family, save, backing=backing)) for _ in range(2))
    record(module, CudaRecorder("cuda"))
    for step in range(5):
        for sizes in SIZES:
            call = varied(inputs(family, *sizes), step)
            assert_same(gradients_of(module, call), gradients_of(plain, call), (step, sizes))
    one, two = (varied(inputs(family, *sizes), 9) for sizes in SIZES)
    outputs = [module(**call).sample for call in (one, two, one)]
    with torch.no_grad():
        module(**two)
    for which, call in ((2, one), (0, one), (1, two)):
        loss_of(outputs[which]).backward()
        assert_same(taken(module), gradients_of(plain, call), f"backward {which} after three forwards")
    for run in recordings(module):
        print(family, save, backing, run.report())
    plain.shutdown()
    module.shutdown()


def test_steps_see_every_update_and_take_no_more_memory(deterministic: None) -> None:
    plain, module = module_of("flux"), module_of("flux")
    record(module, CudaRecorder("cuda"))
    call = inputs("flux", *SIZES[0])
    losses: dict[str, list[float]] = {"plain": [], "recorded": []}
    peaks = []
    for name, one in (("plain", plain), ("recorded", module)):
        optimizer = torch.optim.AdamW(one.parameters(), lr=2e-3, fused=True)
        for _ in range(25):
            torch.cuda.reset_peak_memory_stats()
            optimizer.zero_grad(set_to_none=True)
            loss = loss_of(one(**call).sample)
            loss.backward()
            optimizer.step()
            losses[name].append(float(loss.detach()))
            peaks.append(torch.cuda.max_memory_allocated())
    assert losses["recorded"] == losses["plain"] and len(set(losses["plain"])) == 25
    assert max(peaks[-20:]) <= 1.02 * peaks[-20]
    plain.shutdown()
    module.shutdown()


def test_calls_on_two_streams_wait_for_each_other() -> None:
    plain, module = (emit(*scheduled("flux")) for _ in range(2))
    record(module, CudaRecorder("cuda"))
    sides = [torch.cuda.Stream() for _ in range(2)]
    with torch.no_grad():
        given = [varied(on_card(calls("flux", 2, 8, 8), torch.bfloat16), step) for step in range(8)]
        expected = [plain(**call).sample for call in given]
        torch.cuda.synchronize()
        outputs = []
        for call, side in zip(given, itertools.cycle(sides)):
            with torch.cuda.stream(side):
                torch.cuda._sleep(1_000_000)
                outputs.append(module(**call).sample)
        torch.cuda.synchronize()
    assert all(map(torch.equal, outputs, expected))
    plain.shutdown()
    module.shutdown()


def test_dropped_recordings_give_their_memory_back() -> None:
    module = emit(*scheduled("sdxl"))
    record(module, CudaRecorder("cuda"), limit=1)
    reserved = []
    with torch.no_grad():
        for kind in (1, 2) * 4:
            call = on_card(calls("sdxl", *KINDS[kind]), torch.bfloat16)
            for _ in range(3):
                module(**call)
            gc.collect()
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            reserved.append(torch.cuda.memory_reserved())
    assert recordings(module)[0].report().dropped == 7
    assert max(reserved[2:]) <= max(reserved[:2]) + (4 << 20), reserved
    module.shutdown()


def test_a_function_that_waits_for_the_device_is_named_and_leaves_the_device_usable() -> None:
    root = nn.Module()
    root.add_module("waiting", fx.symbolic_trace(lambda x: torch.ops.aten.nonzero(x).float() @ torch.ones(2, 2, device="cuda")))
    graph = fx.Graph()
    graph.output((graph.call_module("waiting", (graph.placeholder("x"),)),))
    gm = fx.GraphModule(root, graph)
    run, x = recorded(gm), torch.eye(4, device="cuda")
    expected = gm(x)[0]
    assert torch.equal(run(x)[0], expected)
    for _ in range(2):
        with pytest.raises(RuntimeStateError, match=r'waiting cannot be recorded as a CUDA graph.*backend="inductor"'):
            run(x)
        assert torch.equal(gm(x)[0], expected)
    y = torch.randn(1 << 20, device="cuda")
    y.record_stream(torch.cuda.Stream())
    del y
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    fine = recorded(_doubled())
    assert all(torch.equal(fine(x * i)[0], x * i * 2) for i in range(4))


def _doubled() -> fx.GraphModule:
    graph = fx.Graph()
    graph.output((graph.call_function(torch.ops.aten.mul.Tensor, (graph.placeholder("x"), 2)),))
    return fx.GraphModule(nn.Module(), graph)


def test_a_moved_arena_is_recorded_again() -> None:
    plain, module = (emit(*scheduled("flux")) for _ in range(2))
    record(module, CudaRecorder("cuda"))
    call = on_card(calls("flux", 2), torch.bfloat16)
    with torch.no_grad():
        expected = plain(**call).sample
        for turn in range(3):
            if turn:
                old = module.runtime  # held, or the new arena may get the place of this one
                assert old is not None and poisoned(module).runtime is not old
            for _ in range(4):
                assert torch.equal(module(**call).sample, expected)
    assert recordings(module)[0].report().dropped == 2
    plain.shutdown()
    module.shutdown()


@pytest.mark.parametrize("family", ["flux", "sdxl"])
def test_the_backend_is_inductors_recorded(family: str, deterministic: None) -> None:
    """`backend="cudagraph"` against `backend="inductor"`: the same programs, so the same bits, forward and gradients."""
    model, slab = model_and_slab(family)
    modules = {name: emit(graph(family), model, slab, backend=name) for name in ("inductor", "cudagraph")}  # type: ignore[arg-type]
    values = {name: torch.randn_like(p) * 0.05 for name, p in modules["inductor"].adapter_parameters().items()}
    with torch.no_grad():
        for module in modules.values():
            for name, p in module.adapter_parameters().items():
                p.copy_(values[name])
    for step in range(4):
        call = varied(inputs(family, *SIZES[step % 2]), step // 2)
        with torch.no_grad():
            outputs = {name: module(**call).sample for name, module in modules.items()}
        assert torch.equal(outputs["cudagraph"], outputs["inductor"]), step
        found = {name: gradients_of(module, call) for name, module in modules.items()}
        assert_same(found["cudagraph"], found["inductor"], step)
    for module in modules.values():
        module.shutdown()


def test_offloaded_values_do_not_lie_in_the_pool() -> None:
    """The copy to the host goes on while later pieces run."""
    module = module_of("flux", "offload")
    recorder = record(module, CudaRecorder("cuda"))
    seen: list[int] = []
    assert module.runtime is not None
    offload = module.runtime.offload
    module.runtime.offload = lambda x: seen.append(x.data_ptr()) or offload(x)  # type: ignore[method-assign, func-returns-value]
    for _ in range(3):
        gradients_of(module, inputs("flux", *SIZES[0]))
    pool = [s for s in torch.cuda.memory_snapshot() if tuple(s["segment_pool_id"]) == tuple(recorder._pool)]
    assert pool and seen
    inside = [p for p in seen[-len(seen) // 3 :] if any(s["address"] <= p < s["address"] + s["total_size"] for s in pool)]
    assert not inside
    assert any(n.target is ops.offload for n in module.training_step.halves.forward.graph.nodes)  # type: ignore[union-attr]
    module.shutdown()
