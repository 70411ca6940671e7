"""The CUDA paths: registered memory, stream order against slow kernels, no waiting, no leak."""

from __future__ import annotations

import gc
import threading
import time

import pytest
import torch
from runtime_support import BACKINGS, Act, make_store, read, ring_schedule, run_step

from squareq_fx.runtime import Piece, Runtime, Segment, StepReport, WeightStore

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(120)]

SIZES = (300, 511, 512, 40, 100_000, 256)
BIG = 8 << 20
LONG = 200_000_000  # clock cycles: about a tenth of a second


def big_store(backing: str, blocks: int = 4) -> tuple[WeightStore, list[torch.Tensor]]:
    """Blocks b0, b1, ... of 8 MiB; each holds another byte throughout, so that a mixture shows."""
    data = torch.arange(1, blocks + 1, dtype=torch.uint8).repeat_interleave(BIG)
    segments = [Segment(f"b{i}", BIG, (Piece(0, BIG, i * BIG),)) for i in range(blocks)]
    return WeightStore(data, segments, backing=backing), list(data.split(BIG))  # type: ignore[arg-type]


def last(runtime: Runtime) -> StepReport:
    assert runtime.last_step is not None
    return runtime.last_step


@pytest.mark.parametrize("arena", [True, False])
@pytest.mark.parametrize("distance", [0, 1, 2])
@pytest.mark.parametrize("backing", BACKINGS)
@pytest.mark.parametrize("ahead", [False, True])
def test_every_load_has_its_own_bytes(ahead: bool, backing: str, distance: int, arena: bool) -> None:
    store, truth = make_store(SIZES, backing)
    acts, arena_bytes = ring_schedule(list(truth) * 3, 100_096 if arena else None, distance)
    runtime = Runtime(store, device="cuda", arena_bytes=arena_bytes, chunk_bytes=30_000, staging_slots=2)
    if ahead:
        runtime.start_ahead()
    copies: list[tuple[str, torch.Tensor]] = []
    for _ in range(4):
        run_step(runtime, acts, lambda block, weights: copies.append((block, weights.clone())))
    assert runtime.device.type == "cuda" and runtime.device.index is not None
    assert all(read(copy) == truth[block] for block, copy in copies)
    runtime.shutdown()


@pytest.mark.parametrize("backing", BACKINGS)
def test_a_start_ahead_holds_up_no_kernel_and_its_bytes_are_there_when_they_are_read(backing: str) -> None:
    reached, going = threading.Event(), threading.Event()

    def verify(name: str) -> None:
        reached.set()
        assert going.wait(30), "the kernel never ran"

    store, truth = make_store(SIZES, backing, keep_resident=("b0",), verify=verify)
    acts, arena_bytes = ring_schedule(list(truth), 100_096, 1)
    with torch.cuda.stream(torch.cuda.Stream()):
        runtime = Runtime(store, device="cuda", arena_bytes=arena_bytes, chunk_bytes=30_000, staging_slots=2)
        runtime.start_ahead()
        assert reached.wait(30)
        assert int(torch.ones(3, device="cuda").sum()) == 3  # while the start is under way
        going.set()
        copies: list[tuple[str, torch.Tensor]] = []
        run_step(runtime, acts, lambda block, weights: copies.append((block, weights.clone())))
        assert copies and all(read(copy) == truth[block] for block, copy in copies)  # on the stream that made them
    runtime.shutdown()


def test_the_arena_is_aligned_and_blocks_lie_where_the_graph_says() -> None:
    store, _ = make_store(SIZES)
    runtime = Runtime(store, device="cuda", arena_bytes=4096)
    with runtime.step():
        first, second = runtime.load("b0", 0, 300, 0), runtime.load("b1", 0, 511, 768)
        assert first.data_ptr() % 512 == 0 and second.data_ptr() == first.data_ptr() + 768
        runtime.evict(first, "b0", 0)
        runtime.evict(second, "b1", 0)
    runtime.shutdown()


def test_the_slab_is_registered_while_a_runtime_lives() -> None:
    store, _ = big_store("host")
    one, two = Runtime(store, device="cuda", arena_bytes=BIG), Runtime(store, device="cuda", arena_bytes=BIG)
    assert not store.data.is_pinned()
    for runtime in (one, two):
        run_step(runtime, [Act("load", "b1", 0, 0), Act("evict", "b1", 0, 0)], lambda block, weights: None)
        assert store.data.is_pinned()
    assert last(one).host_bytes == store.data.numel()
    one.shutdown()
    assert store.data.is_pinned()
    two.shutdown()
    assert not store.data.is_pinned()


def test_memory_that_cannot_be_registered_goes_through_the_staging_ring() -> None:
    """And CUDA's "last error" is not blamed on the next kernel."""
    store, truth = big_store("host")
    cudart = torch.cuda.cudart()
    assert int(cudart.cudaHostRegister(store.data.data_ptr(), store.data.numel(), 0)) == 0
    try:
        runtime = Runtime(store, device="cuda", arena_bytes=BIG, chunk_bytes=1 << 20)
        acts, _ = ring_schedule(["b0", "b1", "b2"], BIG, 0)
        copies: list[torch.Tensor] = []
        with pytest.warns(RuntimeWarning, match="could not be pinned"):
            run_step(runtime, acts, lambda block, weights: copies.append(weights.clone()))
        torch.zeros(8, device="cuda").add_(1)
        torch.cuda.synchronize()
        assert all(copy.cpu().equal(expected) for copy, expected in zip(copies, truth))
        runtime.shutdown()
    finally:
        assert int(cudart.cudaHostUnregister(store.data.data_ptr())) == 0


@pytest.mark.parametrize("on_side_stream", [False, True])
@pytest.mark.parametrize("arena", [True, False])
@pytest.mark.parametrize("backing", ["host", "disk"])
def test_a_slow_kernel_still_reads_its_own_block(backing: str, arena: bool, on_side_stream: bool) -> None:
    """The next block is prefetched into the same bytes while the kernel before has not even begun to read."""
    store, truth = big_store(backing)
    runtime = Runtime(store, device="cuda", arena_bytes=BIG, chunk_bytes=1 << 20)
    stream = torch.cuda.Stream() if on_side_stream else torch.cuda.current_stream()
    offset = 0 if arena else None
    copies: list[torch.Tensor] = []
    with torch.cuda.stream(stream):
        for _ in range(2):
            with runtime.step():
                for visit in range(4):
                    runtime.prefetch(f"b{visit}", visit, BIG, offset)
                    weights = runtime.load(f"b{visit}", visit, BIG, offset)
                    torch.cuda._sleep(LONG // 4)
                    copies.append(weights.clone())
                    runtime.evict(weights, f"b{visit}", visit)
                    del weights  # without an arena, the allocator may hand the same bytes out again
    torch.cuda.synchronize()
    assert all(copy.cpu().equal(truth[i % 4]) for i, copy in enumerate(copies))
    runtime.shutdown()


def test_a_step_that_failed_leaves_its_kernels_unharmed() -> None:
    store, truth = big_store("host")
    runtime = Runtime(store, device="cuda", arena_bytes=BIG)
    with pytest.raises(ZeroDivisionError), runtime.step():
        weights = runtime.load("b0", 0, BIG, 0)
        torch.cuda._sleep(LONG)
        copy = weights.clone()
        raise ZeroDivisionError
    with runtime.step():
        weights = runtime.load("b1", 0, BIG, 0)
        runtime.evict(weights, "b1", 0)
    assert copy.cpu().equal(truth[0])
    runtime.shutdown()


def test_the_host_does_not_wait_in_the_steady_state() -> None:
    store, _ = big_store("host")
    acts, arena_bytes = ring_schedule(["b0", "b1", "b2", "b3"] * 4, BIG, 2)
    runtime = Runtime(store, device="cuda", arena_bytes=arena_bytes)
    for _ in range(2):
        run_step(runtime, acts, lambda block, weights: None)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        began = time.perf_counter()
        torch.cuda._sleep(10 * LONG)
        run_step(runtime, acts, lambda block, weights: None)
        elapsed = time.perf_counter() - began
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert elapsed < 0.3
    runtime.shutdown()


def test_a_copy_under_a_kernel_is_a_hit_and_a_miss_is_a_stall() -> None:
    store, _ = big_store("host")
    runtime = Runtime(store, device="cuda", arena_bytes=2 * BIG)
    for _ in range(2):  # the first one starts CUDA
        with runtime.step():
            runtime.prefetch("b0", 0, BIG, 0)
            torch.cuda._sleep(LONG)
            runtime.evict(runtime.load("b0", 0, BIG, 0), "b0", 0)
    hit = last(runtime)
    assert (hit.prefetch_hits, hit.prefetch_misses, hit.timing.stalls) == (1, 0, 0)
    assert 0 < hit.timing.copy_ms < hit.timing.step_ms
    with runtime.step():
        runtime.evict(runtime.load("b1", 0, BIG, BIG), "b1", 0)
    miss = last(runtime)
    assert (miss.prefetch_hits, miss.prefetch_misses, miss.timing.stalls) == (0, 1, 1)
    assert 0 < miss.timing.stall_ms <= miss.timing.step_ms
    assert miss.bytes_to_device == BIG
    runtime.shutdown()


@pytest.mark.parametrize("arena", [True, False])
@pytest.mark.parametrize("backing", BACKINGS)
def test_fifty_steps_stay_in_the_memory_of_the_first(backing: str, arena: bool) -> None:
    gc.collect()
    torch.cuda.synchronize()
    sums = torch.zeros(50, 4, dtype=torch.int64, device="cuda")
    step = 0
    before = torch.cuda.memory_allocated()
    store, truth = big_store(backing)
    # Sums of 8-byte words, which wrap: a sum over bytes would need a temporary eight times the block.
    expected = [int(block.view(torch.int64).sum()) for block in truth]
    acts, arena_bytes = ring_schedule(["b0", "b1", "b2", "b3"], BIG if arena else None, 1)
    runtime = Runtime(store, device="cuda", arena_bytes=arena_bytes, poison=True)
    peaks = []

    def use(block: str, weights: torch.Tensor) -> None:
        sums[step, int(block[1])] = weights.view(torch.int64).sum()

    for number in range(50):
        step = number
        torch.cuda.reset_peak_memory_stats()
        run_step(runtime, acts, use)
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert (sums.cpu() == torch.tensor(expected)).all()
    assert max(peaks[1:]) <= 1.02 * peaks[0] + 4096
    if backing != "resident":
        assert peaks[0] < 3 * BIG
    runtime.shutdown()
    del runtime
    gc.collect()
    assert torch.cuda.memory_allocated() - before <= 4096


@pytest.mark.parametrize("mode", ["grad", "no_grad", "inference"])
def test_weights_are_ordinary_tensors_in_every_mode(mode: str) -> None:
    context = {"grad": torch.enable_grad, "no_grad": torch.no_grad, "inference": torch.inference_mode}[mode]
    weights = torch.randn(2, 16, 16)
    segments = [Segment(f"b{i}", 1024, (Piece(0, 1024, weights[i]),)) for i in range(2)]
    store = WeightStore(torch.zeros(0, dtype=torch.uint8), segments)
    runtime = Runtime(store, device="cuda", arena_bytes=1024)
    x = torch.ones(2, 16, requires_grad=True, device="cuda")
    with context(), runtime.step():
        runtime.evict(runtime.load("b0", 0, 1024, 0), "b0", 0)
    with runtime.step():
        loaded = runtime.load("b0", 0, 1024, 0)
        y = x @ loaded.view(torch.float32).view(16, 16)
        runtime.evict(loaded, "b0", 0)
    with context(), runtime.step():
        runtime.evict(runtime.load("b1", 0, 1024, 0), "b1", 0)
    y.sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(y.detach().cpu(), torch.ones(2, 16) @ weights[0], rtol=1e-2, atol=1e-2)
    runtime.shutdown()
