"""A step: the same numbers on each backing, what it reports, and what it refuses."""

from __future__ import annotations

import gc
import threading
import time

import pytest
import torch
from runtime_support import BACKINGS, make_store, read, ring_schedule, run_step

from squareq_fx import ops
from squareq_fx.errors import RuntimeStateError, SlabError
from squareq_fx.runtime import Piece, Runtime, Segment, WeightStore

pytestmark = pytest.mark.timeout(60)

SIZES = (300, 511, 512, 40)


_OTHERS: set[threading.Thread] = set()


@pytest.fixture(autouse=True)
def threads_of_other_tests() -> None:
    """Modules that other tests keep for later have readers of their own, which are not counted here."""
    _OTHERS.clear()
    _OTHERS.update(threading.enumerate())


def reader_threads() -> int:
    return sum(thread.name == "squareq-reader" for thread in threading.enumerate() if thread not in _OTHERS)


def linear_chain(backing: str, layers: int = 12, width: int = 16) -> tuple[WeightStore, torch.Tensor]:
    weights = torch.randn(layers, width, width, generator=torch.Generator().manual_seed(3)) / width**0.5
    data = weights.flatten().view(torch.uint8)
    nbytes = width * width * 4
    segments = [Segment(f"b{i}", nbytes, (Piece(0, nbytes, i * nbytes),)) for i in range(layers)]
    return WeightStore(data, segments, backing=backing), weights  # type: ignore[arg-type]


@pytest.mark.parametrize("distance", [0, 1, 3])
@pytest.mark.parametrize("backing", BACKINGS)
def test_many_blocks_give_the_resident_models_numbers(backing: str, distance: int) -> None:
    store, weights = linear_chain(backing)
    x = expected = torch.randn(5, 16, generator=torch.Generator().manual_seed(4))
    for weight in weights:
        expected = torch.tanh(expected @ weight)
    acts, arena_bytes = ring_schedule([f"b{i}" for i in range(12)], 1024, distance)
    runtime = Runtime(store, arena_bytes=arena_bytes, poison=True)
    y = x

    def use(block: str, loaded: torch.Tensor) -> None:
        nonlocal y
        y = torch.tanh(y @ loaded.view(torch.float32).view(16, 16))

    for _ in range(3):
        y = x
        run_step(runtime, acts, use)
        assert y.equal(expected)
    runtime.shutdown()


@pytest.mark.parametrize("backing", BACKINGS)
def test_each_backing_takes_its_own_path(backing: str) -> None:
    threads: set[str] = set()
    store, _ = make_store(SIZES, backing, verify=lambda name: threads.add(threading.current_thread().name))
    acts, arena_bytes = ring_schedule(list(store.segments), 512, 1)
    runtime = Runtime(store, arena_bytes=arena_bytes)
    for _ in range(2):
        run_step(runtime, acts, lambda block, weights: None)
    if backing == "disk":
        assert threads == {"squareq-reader"}, "what no one asked for is not read"
    else:
        assert all(name.startswith("squareq-check") or name == threading.current_thread().name for name in threads)
    resident = backing == "resident"
    moved = [report.bytes_to_device for report in runtime.history]
    assert moved == ([sum(SIZES), 0] if resident else [sum(SIZES)] * 2)
    report = runtime.last_step
    assert report is not None
    assert report.resident_bytes == (512 + 512 + 512 + 256 if resident else 0)
    assert report.arena_bytes == (0 if resident else 1024)
    assert report.device_bytes == report.resident_bytes + report.arena_bytes
    runtime.shutdown()
    assert reader_threads() == 0


@pytest.mark.parametrize("backing", ["host", "disk"])
def test_kept_blocks_are_copied_once_and_need_no_arena(backing: str) -> None:
    store, truth = make_store(SIZES, backing, keep_resident=["b1", "b3"])
    acts, _ = ring_schedule(list(truth), 512, 0)
    runtime = Runtime(store, arena_bytes=512, poison=True)
    for _ in range(2):
        run_step(
            runtime,
            acts,
            lambda block, weights: None if read(weights) == truth[block] else pytest.fail(block),
        )
    first, second = runtime.history
    assert (first.bytes_to_device, second.bytes_to_device) == (sum(SIZES), 300 + 512)
    assert second.resident_bytes == 512 + 256
    assert (second.prefetch_misses, second.loads, second.evictions) == (2, 4, 4)
    with runtime.step():  # two visits of a kept block at once are one memory
        one, two = runtime.load("b1", 0, 511, 0), runtime.load("b1", 1, 511, 0)
        assert one.data_ptr() == two.data_ptr()
        runtime.evict(one, "b1", 0)
        runtime.evict(two, "b1", 1)
    runtime.shutdown()


@pytest.mark.parametrize("backing", ["host", "disk"])
def test_the_report_of_a_ring_schedule(backing: str) -> None:
    store, _ = make_store(SIZES, backing)
    order = ["b0", "b1", "b2", "b0", "b3"]
    acts, arena_bytes = ring_schedule(order, 512, 2)
    runtime = Runtime(store, arena_bytes=arena_bytes)
    run_step(runtime, acts, lambda block, weights: None)
    report = runtime.last_step
    assert report is not None and report.index == 0
    assert (report.loads, report.evictions, report.prefetches) == (5, 5, 5)
    assert (report.prefetch_hits, report.prefetch_misses, report.dropped) == (5, 0, 0)
    assert report.bytes_to_device == 300 + 511 + 512 + 300 + 40
    assert report.bytes_to_host == 0
    assert report.peak_bytes_in_use == 300 + 511 + 512 + 0
    assert [(e.kind, e.block, e.visit) for e in report.events] == [(a.kind, a.block, a.visit) for a in acts]
    assert [e.t for e in report.events] == sorted(e.t for e in report.events)
    assert report.events[-1].bytes_in_use == 0
    assert report.timing is report.timing
    assert report.timing.step_ms >= report.timing.stall_ms >= 0
    assert report.timing.compute_ms + report.timing.stall_ms == pytest.approx(report.timing.step_ms)
    assert report.host_bytes > 0
    runtime.shutdown()


def test_waiting_for_the_disk_is_a_stall_with_a_time_and_a_finished_prefetch_is_none() -> None:
    store, _ = make_store(SIZES, "disk", verify=lambda name: time.sleep(0.05))
    runtime = Runtime(store, arena_bytes=2048)
    with runtime.step():
        runtime.evict(runtime.load("b0", 0, 300, 0), "b0", 0)
        runtime.prefetch("b1", 0, 511, 512)
        time.sleep(0.2)
        runtime.evict(runtime.load("b1", 0, 511, 512), "b1", 0)
    report = runtime.last_step
    assert report is not None
    assert (report.prefetch_hits, report.prefetch_misses, report.timing.stalls) == (1, 1, 1)
    assert 40 < report.timing.stall_ms < 190
    assert report.timing.copy_ms > 80
    runtime.shutdown()


@pytest.mark.parametrize("backing", ["host", "disk"])
def test_a_left_over_prefetch_serves_the_next_step(backing: str) -> None:
    store, truth = make_store(SIZES, backing)
    runtime = Runtime(store, arena_bytes=1024)
    for _ in range(3):
        with runtime.step():
            weights = runtime.load("b0", 0, 300, 0)
            assert read(weights) == truth["b0"]
            runtime.evict(weights, "b0", 0)
            runtime.prefetch("b0", 0, 300, 0)
    assert [report.prefetch_hits for report in runtime.history] == [0, 1, 1]
    with runtime.step():  # asked for again: the copy that is there will do
        runtime.prefetch("b0", 0, 300, 0)
    with runtime.step():
        pass
    with runtime.step():
        pass
    assert [report.dropped for report in runtime.history] == [0, 0, 0, 0, 1, 0]
    assert [report.bytes_to_device for report in runtime.history] == [600, 300, 300, 0, 0, 0]
    runtime.shutdown()


@pytest.mark.parametrize("backing", ["host", "disk"])
def test_a_left_over_prefetch_gives_way(backing: str) -> None:
    store, truth = make_store(SIZES, backing)
    runtime = Runtime(store, arena_bytes=1024)
    with runtime.step():
        runtime.prefetch("b0", 0, 300, 256)
    with runtime.step():
        weights = runtime.load("b2", 0, 512, 0)
        assert read(weights) == truth["b2"]
        runtime.evict(weights, "b2", 0)
    assert runtime.last_step is not None and runtime.last_step.dropped == 1
    runtime.shutdown()


@pytest.mark.parametrize("backing", BACKINGS)
def test_an_error_inside_a_step_comes_through_and_the_next_step_is_right(backing: str) -> None:
    store, truth = make_store(SIZES, backing)
    acts, arena_bytes = ring_schedule(list(truth), 512, 2)
    runtime = Runtime(store, arena_bytes=arena_bytes, poison=True)
    seen: list[str] = []
    fail_after = 0

    def use(block: str, weights: torch.Tensor) -> None:
        assert read(weights) == truth[block]
        seen.append(block)
        if len(seen) == fail_after:
            raise ZeroDivisionError

    for number in range(1, len(truth) + 1):
        fail_after = number
        seen.clear()
        with pytest.raises(ZeroDivisionError):
            run_step(runtime, acts, use)
    fail_after = 0
    seen.clear()
    run_step(runtime, acts, use)
    assert seen == list(truth)
    runtime.shutdown()


@pytest.mark.parametrize("backing", ["host", "disk"])
def test_damaged_bytes_raise_in_the_load_and_only_there(backing: str) -> None:
    bad = {"b1"}

    def verify(name: str) -> None:
        if name in bad:
            raise SlabError(f"{name} is damaged")

    store, truth = make_store(SIZES, backing, verify=verify)
    runtime = Runtime(store, arena_bytes=2048)
    with pytest.raises(SlabError, match="b1 is damaged"), runtime.step():
        runtime.evict(runtime.load("b0", 0, 300, 0), "b0", 0)
        runtime.prefetch("b1", 0, 511, 512)
        runtime.load("b1", 0, 511, 512)
    with runtime.step():
        with pytest.raises(SlabError, match="b1 is damaged"):
            runtime.load("b1", 0, 511, None)
        bad.clear()
        weights = runtime.load("b1", 0, 511, 512)
        assert read(weights) == truth["b1"]
        runtime.evict(weights, "b1", 0)
    runtime.shutdown()


def test_a_damaged_resident_block_raises_before_anything_runs() -> None:
    def verify(name: str) -> None:
        raise SlabError(f"{name} is damaged")

    store, _ = make_store(SIZES, "resident", verify=verify)
    runtime = Runtime(store)
    for _ in range(2):
        with pytest.raises(SlabError, match="b0 is damaged"), runtime.step():
            pytest.fail("the step began")


def test_what_is_in_use_is_never_overwritten() -> None:
    store, truth = make_store(SIZES)
    runtime = Runtime(store, arena_bytes=1024)
    with runtime.step():
        weights = runtime.load("b0", 0, 300, 256)
        for call in (runtime.load, runtime.prefetch):
            with pytest.raises(RuntimeStateError, match=r"'b2' \(visit 0\).*where 'b0' \(visit 0\) still is"):
                call("b2", 0, 512, 0)
            with pytest.raises(RuntimeStateError, match="do not fit into an arena of 1024"):
                call("b2", 0, 512, 768)
            with pytest.raises(RuntimeStateError, match="multiple of 256"):
                call("b2", 0, 512, 600)
            with pytest.raises(RuntimeStateError, match="is loaded already"):
                call("b0", 0, 300, 256)
            with pytest.raises(RuntimeStateError, match="compiled for another slab"):
                call("b2", 0, 511, 0)
        with pytest.raises(RuntimeStateError, match="not the weights"):
            runtime.evict(weights[1:], "b0", 0)
        with pytest.raises(RuntimeStateError, match="is not loaded"):
            runtime.evict(weights, "b0", 1)
        runtime.prefetch("b3", 0, 40, 0)
        with pytest.raises(RuntimeStateError, match="prefetched to arena offset 0, not to 768"):
            runtime.load("b3", 0, 40, 768)
        with pytest.raises(RuntimeStateError, match="prefetched already"):
            runtime.prefetch("b3", 0, 40, 0)
        assert read(weights) == truth["b0"]
        runtime.evict(weights, "b0", 0)


def test_poison_makes_a_use_after_evict_visible() -> None:
    store, _ = make_store(SIZES)
    runtime = Runtime(store, arena_bytes=1024, poison=True)
    with runtime.step():
        in_arena, fresh = runtime.load("b0", 0, 300, 0), runtime.load("b2", 0, 512, None)
        runtime.evict(in_arena, "b0", 0)
        runtime.evict(fresh, "b2", 0)
    assert read(in_arena) == b"\xab" * 300
    assert read(fresh) == b"\xab" * 512


def test_one_step_at_a_time() -> None:
    store, _ = make_store(SIZES)
    runtime = Runtime(store, arena_bytes=512)
    with runtime.step():
        with pytest.raises(RuntimeStateError, match="in a step already"), runtime.step():
            pytest.fail("a second step began")
        runtime.evict(runtime.load("b0", 0, 300, 0), "b0", 0)
    with pytest.raises(RuntimeStateError, match="outside a step"):
        runtime.load("b0", 0, 300, 0)
    with runtime.step():
        pass


@pytest.mark.parametrize("arena", [True, False])
@pytest.mark.parametrize("mode", ["grad", "no_grad", "inference"])
def test_weights_are_ordinary_tensors_in_every_mode(mode: str, arena: bool) -> None:
    """Loaded in one mode, overwritten in another, saved by autograd in between: never an autograd error."""
    store, _ = linear_chain("host", layers=2)
    runtime = Runtime(store, arena_bytes=1024)
    context = {"grad": torch.enable_grad, "no_grad": torch.no_grad, "inference": torch.inference_mode}[mode]
    offset = 0 if arena else None
    x = torch.ones(2, 16, requires_grad=True)
    with context(), runtime.step():
        runtime.evict(runtime.load("b0", 0, 1024, offset), "b0", 0)
    with runtime.step():
        weights = runtime.load("b0", 0, 1024, offset)
        assert not weights.is_inference() and not weights.requires_grad
        loss = (x @ weights.view(torch.float32).view(16, 16)).sum()
        runtime.evict(weights, "b0", 0)
    with context(), runtime.step():
        runtime.evict(runtime.load("b1", 0, 1024, offset), "b1", 0)
    loss.backward()
    assert x.grad is not None


def test_the_operations_of_the_graph_reach_the_active_runtime() -> None:
    store, truth = make_store(SIZES)
    runtime = Runtime(store, arena_bytes=1024)
    with runtime.step(), ops.activate(runtime):
        ops.prefetch("b1", visit=0, nbytes=511, offset=512)
        weights = ops.load("b1", visit=0, nbytes=511, offset=512, device=torch.device("cpu"))
        assert read(weights) == truth["b1"]
        ops.evict(weights, "b1", 0)
    assert runtime.last_step is not None and runtime.last_step.prefetch_hits == 1


@pytest.mark.parametrize("arena", [True, False])
@pytest.mark.parametrize("backing", BACKINGS)
def test_fifty_steps_keep_every_value_and_leak_nothing(backing: str, arena: bool) -> None:
    store, truth = make_store(SIZES, backing)
    acts, arena_bytes = ring_schedule(list(truth) * 2, 512 if arena else None, 1)
    runtime = Runtime(store, arena_bytes=arena_bytes, poison=True, history=4)

    def check(block: str, weights: torch.Tensor) -> None:
        assert read(weights) == truth[block]

    tensors = []
    for step in range(50):
        run_step(runtime, acts, check)
        if step in (9, 49):
            gc.collect()
            tensors.append(sum(type(thing) is torch.Tensor for thing in gc.get_objects()))
    assert tensors[0] == tensors[1]
    assert len(runtime.history) == 4
    assert {report.device_bytes for report in runtime.history} == {runtime.history[0].device_bytes}
    runtime.shutdown()


def test_nothing_starts_before_the_first_step() -> None:
    store, _ = make_store(SIZES, "disk")
    runtime = Runtime(store, device="cuda", arena_bytes=1 << 40)
    assert runtime.device == torch.device("cuda") and runtime.last_step is None
    assert not torch.cuda.is_initialized() or torch.cuda.is_available()
    runtime.shutdown()
    with pytest.raises(RuntimeStateError, match="not to meta"), Runtime(store, device="meta").step():
        pytest.fail("the step began")
