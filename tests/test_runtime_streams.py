"""Stream order, on a simulated device that runs copies and kernels in any order the runtime's marks allow."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from runtime_support import SimEngine, make_store, ring_schedule, run_step

from squareq_fx.errors import RuntimeStateError
from squareq_fx.runtime import Runtime

pytestmark = pytest.mark.timeout(60)

SIZES = (300, 511, 512, 40, 256)


def reader(
    engine: SimEngine, truth: dict[str, bytes], wrong: list[str]
) -> Callable[[str, torch.Tensor], None]:
    """Queues kernels that read a block's weights, some time after the load returned."""

    def use(block: str, weights: torch.Tensor) -> None:
        pointer, nbytes = weights.data_ptr(), weights.numel()

        def kernel() -> None:
            if ctypes.string_at(pointer, nbytes) != truth[block]:
                wrong.append(block)

        for _ in range(3):
            engine.compute(kernel)

    return use


def simulate(
    order: list[int],
    distance: int,
    backing: str,
    *,
    arena: bool,
    seed: int = 0,
    copy_first: float | None = None,
    waits: bool = True,
) -> list[str]:
    """Runs three steps and returns the blocks whose kernels read something else than their weights."""
    store, truth = make_store(SIZES, backing)
    engines: list[SimEngine] = []

    def make_engine(device: torch.device) -> SimEngine:
        engines.append(SimEngine(device, seed=seed, waits=waits))
        if copy_first is not None:
            engines[0].lag(copy_first=copy_first)
        return engines[0]

    acts, arena_bytes = ring_schedule([f"b{i}" for i in order], 512 if arena else None, distance)
    runtime = Runtime(
        store, arena_bytes=arena_bytes, make_engine=make_engine, chunk_bytes=100, staging_slots=2
    )
    wrong: list[str] = []
    for _ in range(3):
        run_step(runtime, acts, lambda block, weights: reader(engines[0], truth, wrong)(block, weights))
    engines[0].synchronize()
    for report in runtime.history:
        assert 0 <= report.timing.stall_ms <= report.timing.step_ms
    runtime.shutdown()
    return wrong


schedules = st.tuples(st.lists(st.integers(0, len(SIZES) - 1), min_size=1, max_size=10), st.integers(0, 3))


@pytest.mark.parametrize("arena", [True, False])
@pytest.mark.parametrize("backing", ["host", "disk"])
@given(schedule=schedules, seed=st.integers(0, 2**20))
def test_kernels_read_their_own_block(
    schedule: tuple[list[int], int], seed: int, backing: str, arena: bool
) -> None:
    assert simulate(*schedule, backing, arena=arena, seed=seed) == []


@pytest.mark.parametrize("arena", [True, False])
@pytest.mark.parametrize("backing", ["host", "disk"])
def test_the_simulation_catches_a_copy_that_does_not_wait(backing: str, arena: bool) -> None:
    """On a device that copies as early as it may and computes as late as it may."""
    order = [0, 1, 2, 3, 4, 1]
    assert simulate(order, 1, backing, arena=arena, copy_first=1.0) == []
    assert simulate(order, 1, backing, arena=arena, copy_first=1.0, waits=False) != []


@pytest.mark.parametrize("backing", ["host", "disk"])
@given(seed=st.integers(0, 2**20), fail_at=st.integers(0, 8))
def test_an_error_inside_a_step_leaves_no_copy_that_could_harm_the_next(
    seed: int, fail_at: int, backing: str
) -> None:
    store, truth = make_store(SIZES, backing)
    engine = SimEngine(torch.device("cpu"), seed=seed)
    acts, arena_bytes = ring_schedule(["b0", "b1", "b2"], 512, 1)
    runtime = Runtime(store, arena_bytes=arena_bytes, make_engine=lambda _: engine, chunk_bytes=100)
    wrong: list[str] = []
    use = reader(engine, truth, wrong)

    class Stop(Exception):
        pass

    live: dict[str, torch.Tensor] = {}
    with pytest.raises(Stop), runtime.step():
        for act in acts[:fail_at]:
            nbytes = store.segments[act.block].nbytes
            if act.kind == "prefetch":
                runtime.prefetch(act.block, act.visit, nbytes, act.offset)
            elif act.kind == "load":
                live[act.block] = runtime.load(act.block, act.visit, nbytes, act.offset)
                use(act.block, live[act.block])
            else:
                runtime.evict(live[act.block], act.block, act.visit)
        raise Stop
    run_step(runtime, acts, use)
    engine.synchronize()
    assert wrong == []
    runtime.shutdown()


def test_a_prefetch_that_finished_is_a_hit_and_no_stall() -> None:
    store, _ = make_store(SIZES)
    engine = SimEngine(torch.device("cpu"))
    runtime = Runtime(store, arena_bytes=1024, make_engine=lambda _: engine)
    with runtime.step():
        runtime.prefetch("b0", 0, 300, 0)
        engine.synchronize()
        runtime.evict(runtime.load("b0", 0, 300, 0), "b0", 0)
    report = runtime.last_step
    assert report is not None
    assert (report.prefetch_hits, report.prefetch_misses, report.timing.stalls) == (1, 0, 0)


def test_a_prefetch_that_is_late_is_a_hit_and_a_stall() -> None:
    store, _ = make_store(SIZES)
    engine = SimEngine(torch.device("cpu"))
    engine.lag(copy_first=0.0)
    runtime = Runtime(store, arena_bytes=1024, make_engine=lambda _: engine)
    with runtime.step():
        runtime.prefetch("b0", 0, 300, 0)
        runtime.evict(runtime.load("b0", 0, 300, 0), "b0", 0)
    report = runtime.last_step
    assert report is not None
    assert (report.prefetch_hits, report.prefetch_misses, report.timing.stalls) == (1, 0, 1)
    assert report.timing.stall_ms > 0


def test_the_host_never_waits_for_the_device_in_a_step() -> None:
    """With pinned memory a whole step is queued before anything at all has run."""
    store, _ = make_store(SIZES)
    engine = SimEngine(torch.device("cpu"))
    engine.lag(copy_first=0.5)
    acts, arena_bytes = ring_schedule(["b0", "b1", "b2", "b3", "b4"] * 3, 512, 2)
    runtime = Runtime(store, arena_bytes=arena_bytes, make_engine=lambda _: engine)
    for _ in range(2):
        run_step(runtime, acts, lambda block, weights: None)
    assert runtime.last_step is not None and runtime.last_step.loads == 15
    assert engine.operations_run == 0
    with pytest.raises(RuntimeStateError, match="outside a step"):
        runtime.prefetch("b0", 0, 300, 0)
