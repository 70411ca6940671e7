"""Ending: whatever is under way, nothing hangs, nothing is left, and later calls say so."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import time
import weakref

import pytest
import torch
from runtime_support import BACKINGS, make_store, read, ring_schedule, run_step

from squareq_fx.errors import RuntimeStateError
from squareq_fx.runtime import Runtime

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


@pytest.mark.parametrize("backing", BACKINGS)
def test_shutdown_is_idempotent_and_final(backing: str) -> None:
    store, truth = make_store(SIZES, backing)
    acts, arena_bytes = ring_schedule(list(truth), 512, 1)
    runtime = Runtime(store, arena_bytes=arena_bytes)
    run_step(runtime, acts, lambda block, weights: None)
    for _ in range(3):
        runtime.shutdown()
    assert reader_threads() == 0
    for call in (runtime.load, runtime.prefetch):
        with pytest.raises(RuntimeStateError, match="was shut down"):
            call("b0", 0, 300, 0)
    with pytest.raises(RuntimeStateError, match="was shut down"):
        runtime.evict(torch.empty(0, dtype=torch.uint8), "b0", 0)
    with pytest.raises(RuntimeStateError, match="was shut down"), runtime.step():
        pytest.fail("a step began")
    assert runtime.last_step is not None and runtime.last_step.timing.step_ms >= 0
    again = Runtime(store, arena_bytes=arena_bytes)  # the store is not used up
    run_step(
        again, acts, lambda block, weights: None if read(weights) == truth[block] else pytest.fail(block)
    )
    again.shutdown()


def test_a_runtime_that_never_ran_shuts_down() -> None:
    Runtime(make_store(SIZES, "disk")[0]).shutdown()


@pytest.mark.parametrize("backing", BACKINGS)
def test_shutdown_inside_a_step(backing: str) -> None:
    store, _ = make_store(SIZES, backing)
    runtime = Runtime(store, arena_bytes=2048)
    with runtime.step():
        runtime.prefetch("b0", 0, 300, 0)
        runtime.load("b1", 0, 511, 512)
        runtime.shutdown()
        with pytest.raises(RuntimeStateError, match="was shut down"):
            runtime.load("b0", 0, 300, 0)
    assert reader_threads() == 0


def test_shutdown_with_reads_queued_does_not_serve_them() -> None:
    served: list[str] = []

    def slow(name: str) -> None:
        served.append(name)
        time.sleep(0.2)

    store, _ = make_store(SIZES, "disk", verify=slow)
    runtime = Runtime(store, arena_bytes=2048)
    began = time.perf_counter()
    with runtime.step():
        for index, size in enumerate(SIZES):
            runtime.prefetch(f"b{index}", 0, size, 512 * index)
        runtime.shutdown()
    assert time.perf_counter() - began < 2
    assert len(served) <= 1
    assert reader_threads() == 0


def test_a_load_that_waits_hears_of_the_shutdown() -> None:
    """From another thread, while the reader is stuck in a slow disk."""
    go_on = threading.Event()
    store, _ = make_store(SIZES, "disk", verify=lambda name: go_on.wait(20) and None)
    runtime = Runtime(store, arena_bytes=2048)
    stopper = threading.Thread(target=runtime.shutdown)
    with runtime.step(), pytest.raises(RuntimeStateError, match=r"cancelled|shut down"):
        runtime.prefetch("b0", 0, 300, 0)
        stopper.start()
        threading.Timer(0.2, go_on.set).start()
        runtime.load("b0", 0, 300, 0)
    stopper.join(timeout=20)
    assert not stopper.is_alive() and reader_threads() == 0


def test_a_reader_that_died_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    store, _ = make_store(SIZES, "disk")
    runtime = Runtime(store, arena_bytes=2048)
    with runtime.step():
        assert runtime._device is not None and runtime._device.carrier is not None
        carrier = runtime._device.carrier
        carrier._requests.put(None)  # type: ignore[attr-defined]
        carrier._thread.join(timeout=20)  # type: ignore[attr-defined]
        with pytest.raises(RuntimeStateError, match="while a load was waiting"):
            runtime.load("b0", 0, 300, 0)
    runtime.shutdown()


def test_verify_may_shut_the_runtime_down_on_the_readers_own_thread() -> None:
    runtimes: list[Runtime] = []
    store, _ = make_store(SIZES, "disk", verify=lambda name: runtimes[0].shutdown())
    runtimes.append(Runtime(store, arena_bytes=2048))
    with runtimes[0].step(), pytest.raises(RuntimeStateError):
        runtimes[0].load("b0", 0, 300, 0)


@pytest.mark.parametrize("in_a_cycle", [False, True])
def test_a_forgotten_runtime_ends_its_thread(in_a_cycle: bool) -> None:
    store, truth = make_store(SIZES, "disk")
    acts, arena_bytes = ring_schedule(list(truth), 512, 1)
    runtime: Runtime | None = Runtime(store, arena_bytes=arena_bytes)
    assert runtime is not None
    run_step(runtime, acts, lambda block, weights: None)
    assert reader_threads() == 1
    if in_a_cycle:
        runtime.myself = runtime  # type: ignore[attr-defined]
    gone = weakref.ref(runtime)
    runtime = None
    gc.collect()
    assert gone() is None and reader_threads() == 0


@pytest.mark.parametrize("ending", ["", "raise SystemExit(0)", "runtime.shutdown()"])
def test_the_interpreter_exits_with_reads_under_way(ending: str) -> None:
    script = f"""
import time, torch
from squareq_fx.runtime import Piece, Runtime, Segment, WeightStore
segments = [Segment(str(i), 4096, (Piece(0, 4096, 0),)) for i in range(64)]
data = torch.zeros(4096, dtype=torch.uint8)
store = WeightStore(data, segments, backing="disk", verify=lambda name: time.sleep(0.05))
runtime = Runtime(store, arena_bytes=64 * 4096)
with runtime.step():
    for i in range(64):
        runtime.prefetch(str(i), 0, 4096, i * 4096)
    runtime.evict(runtime.load("0", 0, 4096, 0), "0", 0)
assert not torch.cuda.is_initialized()
{ending}
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=50)
    assert (done.returncode, done.stderr) == (0, "")


def test_two_runtimes_share_one_store_and_end_apart() -> None:
    store, truth = make_store(SIZES, "disk")
    acts, arena_bytes = ring_schedule(list(truth), 512, 1)
    one, two = Runtime(store, arena_bytes=arena_bytes), Runtime(store, arena_bytes=arena_bytes)

    def check(block: str, weights: torch.Tensor) -> None:
        assert read(weights) == truth[block]

    failures: list[BaseException] = []

    def work(runtime: Runtime) -> None:
        try:
            for _ in range(20):
                run_step(runtime, acts, check)
        except BaseException as error:
            failures.append(error)
            raise

    threads = [threading.Thread(target=work, args=(runtime,)) for runtime in (one, two)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=50)
    assert failures == [] and not any(thread.is_alive() for thread in threads)
    one.shutdown()
    run_step(two, acts, check)
    two.shutdown()
