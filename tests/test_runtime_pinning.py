"""Registered host memory: one call per mapping, shared, given back, and done without if CUDA refuses."""

from __future__ import annotations

import gc
import threading
import warnings
import weakref
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from runtime_support import SimEngine, make_store, read, ring_schedule, run_step

from squareq_fx.errors import RuntimeStateError
from squareq_fx.runtime import Piece, Runtime, Segment, WeightStore, pinning
from squareq_fx.runtime.carriers import StagedCarrier, Transfer
from squareq_fx.runtime.device import start_device
from squareq_fx.runtime.engines import CpuEngine

pytestmark = pytest.mark.timeout(60)

SIZES = (300, 511, 512, 40)


@dataclass
class FakeCudart:
    """Takes ranges up to `limit` bytes in all, and like CUDA none that overlaps another."""

    limit: int = 1 << 30
    ranges: dict[int, int] = field(default_factory=dict)
    calls: int = 0

    def cudaHostRegister(self, pointer: int, nbytes: int, flags: int) -> int:
        self.calls += 1
        assert nbytes > 0 and flags == 0
        for start, size in self.ranges.items():
            assert pointer + nbytes <= start or start + size <= pointer, "registered twice"
        if sum(self.ranges.values()) + nbytes > self.limit:
            return 2
        self.ranges[pointer] = nbytes
        return 0

    def cudaHostUnregister(self, pointer: int) -> int:
        return 0 if self.ranges.pop(pointer, None) else 713

    def cudaGetErrorString(self, code: int) -> str:
        return f"error {code}"


@pytest.fixture
def cudart(monkeypatch: pytest.MonkeyPatch) -> FakeCudart:
    fake = FakeCudart()
    monkeypatch.setattr(pinning, "_cudart", lambda: fake)
    monkeypatch.setattr(pinning, "_forget_last_error", lambda: None)
    monkeypatch.setattr(pinning, "_ranges", {})
    return fake


def start(store: WeightStore) -> Runtime:
    runtime = Runtime(store, arena_bytes=1024, make_engine=lambda device: SimEngine(device, can_pin=True))
    acts, _ = ring_schedule(list(store.segments), 512, 1)
    run_step(runtime, acts, lambda block, weights: None)
    return runtime


def test_the_slab_is_one_range_and_the_assembled_segments_another(cudart: FakeCudart) -> None:
    store, _ = make_store(SIZES)
    runtime = start(store)
    assert sorted(cudart.ranges.values()) == sorted([store.data.numel(), 512 + 512])
    assert runtime.last_step is not None
    assert runtime.last_step.host_bytes == sum(cudart.ranges.values())
    runtime.shutdown()
    runtime.shutdown()
    assert cudart.ranges == {}


def test_models_share_the_range_and_the_last_one_gives_it_back(cudart: FakeCudart) -> None:
    first, _ = make_store(SIZES)
    second = WeightStore(first.data, [Segment("s", 100, (Piece(0, 100, 0),))])
    runtimes = [start(first), start(first), start(second)]
    assert cudart.calls == 2
    for runtime in runtimes:
        assert first.data.data_ptr() in cudart.ranges
        runtime.shutdown()
    assert cudart.ranges == {}
    again = start(second)
    assert list(cudart.ranges) == [first.data.data_ptr()]
    again.shutdown()


@pytest.mark.parametrize("limit", [0, 1500])
def test_without_enough_lockable_memory_a_staging_ring_is_used(cudart: FakeCudart, limit: int) -> None:
    """With the second limit the slab can be registered and the assembled segments cannot."""
    cudart.limit = limit
    store, truth = make_store(SIZES)
    engine = SimEngine(torch.device("cpu"), can_pin=True)
    runtime = Runtime(store, arena_bytes=1024, make_engine=lambda _: engine)
    acts, _ = ring_schedule(list(truth), 512, 1)

    def check(block: str, weights: torch.Tensor) -> None:
        engine.synchronize()
        assert read(weights) == truth[block]

    with pytest.warns(RuntimeWarning, match="could not be pinned .error 2.*ulimit -l"):
        run_step(runtime, acts, check)
    assert cudart.ranges == {} and engine.threads == {"squareq-reader"}
    runtime.shutdown()


@pytest.mark.parametrize("keep", ([], ["b1", "b3"]))
def test_resident_segments_come_through_the_staging_ring(cudart: FakeCudart, keep: list[str]) -> None:
    """Checked by several threads at once, each segment once; the ring's thread ends with the last of them."""
    together, seen = threading.Barrier(2, timeout=30), list[str]()

    def verify(name: str) -> None:
        seen.append(name)
        together.wait()

    backing = "disk" if keep else "resident"
    store, truth = make_store(SIZES, backing, keep_resident=keep, verify=verify)
    engine = SimEngine(torch.device("cpu"), can_pin=True)
    threads = threading.enumerate()
    device = start_device(store, lambda: engine, arena_bytes=1024, chunk_bytes=200, staging_slots=2)
    assert {name: read(view) for name, view in device.resident.items()} == {name: truth[name] for name in keep or truth}
    assert sorted(seen) == sorted(keep or truth) and engine.threads == {"squareq-reader"} and cudart.ranges == {}
    if device.carrier is not None:
        device.carrier.close()
    assert threading.enumerate() == threads


def test_a_corrupt_resident_segment_is_refused_and_leaves_nothing(cudart: FakeCudart) -> None:
    def verify(name: str) -> None:
        if name == "b2":
            raise ValueError(f"{name} is corrupt")

    made: list[weakref.ref[torch.Tensor]] = []

    class Watched(CpuEngine):
        can_pin = True

        def allocate(self, nbytes: int) -> torch.Tensor:
            memory = super().allocate(nbytes)
            made.append(weakref.ref(memory))
            return memory

    store, _ = make_store(SIZES, "resident", verify=verify)
    threads = threading.enumerate()
    gc.collect()
    gc.disable()
    try:
        for _ in range(2):
            with pytest.raises(ValueError, match="b2 is corrupt"):
                start_device(store, lambda: Watched(torch.device("cpu")), arena_bytes=0, chunk_bytes=200, staging_slots=2)
        assert len(made) == 6 and [ref() for ref in made] == [None] * 6, "the arena, the weights and the ring, twice"
    finally:
        gc.enable()
    assert threading.enumerate() == threads


def test_without_pinned_memory_resident_segments_are_copied_as_they_are() -> None:
    class Refusing(CpuEngine):
        can_pin = True

        def stage(self, nbytes: int) -> torch.Tensor:
            raise RuntimeError("CUDA error: out of memory")

    store, truth = make_store(SIZES, "resident")
    engine = Refusing(torch.device("cpu"))
    device = start_device(store, lambda: engine, arena_bytes=0, chunk_bytes=200, staging_slots=2)
    assert {name: read(view) for name, view in device.resident.items()} == truth


def test_without_more_threads_a_start_checks_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """As when the main thread has ended: then no pool takes work any more."""

    def refuse(*_: object) -> None:
        raise RuntimeError("cannot schedule new futures after interpreter shutdown")

    monkeypatch.setattr(ThreadPoolExecutor, "submit", refuse)
    seen: list[str] = []
    store, truth = make_store(SIZES, "resident", verify=seen.append)
    device = start_device(store, lambda: CpuEngine(torch.device("cpu")), arena_bytes=0, chunk_bytes=200, staging_slots=2)
    assert {name: read(view) for name, view in device.resident.items()} == truth and seen == list(truth)


def test_a_transfer_says_once_what_went_wrong() -> None:
    store, _ = make_store(SIZES, "disk", verify=lambda name: (_ for _ in ()).throw(ValueError(f"{name} is corrupt")))
    carrier = StagedCarrier(store, CpuEngine(torch.device("cpu")), ["b0"], chunk_bytes=200, slots=2)
    transfer = carrier.send("b0", torch.empty(SIZES[0], dtype=torch.uint8), ())
    with pytest.raises(ValueError, match="b0 is corrupt"):
        transfer.issued(carrier)
    with pytest.raises(RuntimeStateError, match="failed before"):
        transfer.issued(carrier)
    carrier.close()


@pytest.mark.parametrize("ending", ["served", "cancelled", "corrupt"])
def test_the_reader_lets_go_of_the_memory_before_it_says_that_the_copy_is_issued(
    monkeypatch: pytest.MonkeyPatch, ending: str
) -> None:
    """Who waits for a copy may evict it at once: that its bytes are free then must not depend on when the reader runs again."""
    checking, alive = threading.Event(), list[bool]()

    def verify(_: str) -> None:
        assert checking.wait(30)
        if ending == "corrupt":
            raise ValueError("corrupt")

    store, _ = make_store(SIZES, "disk", verify=verify)
    carrier = StagedCarrier(store, CpuEngine(torch.device("cpu")), ["b0"], chunk_bytes=200, slots=2)
    memory = torch.empty(SIZES[0], dtype=torch.uint8)
    gone = weakref.ref(memory)
    for name in ("finish", "fail"):
        original = getattr(Transfer, name)

        def ended(*arguments: Any, original: Any = original) -> None:
            alive.append(gone() is not None)
            original(*arguments)

        monkeypatch.setattr(Transfer, name, ended)
    transfer = carrier.send("b0", memory, ())
    del memory
    transfer.cancelled = ending == "cancelled"
    checking.set()
    with nullcontext() if ending == "served" else pytest.raises((RuntimeStateError, ValueError)):
        transfer.issued(carrier)
    assert alive == [False]
    carrier.close()


def test_segments_are_checked_while_memory_is_pinned(cudart: FakeCudart, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pinning waits for the first check here; one that is corrupt is an error of its load."""
    enough, threads = threading.Semaphore(0), list[str]()

    def verify(name: str) -> None:
        threads.append(threading.current_thread().name)
        enough.release()
        if name == "b3":
            raise ValueError("b3 is corrupt")

    register = cudart.cudaHostRegister

    def slowly(pointer: int, nbytes: int, flags: int) -> int:
        assert enough.acquire(timeout=30)
        return register(pointer, nbytes, flags)

    monkeypatch.setattr(cudart, "cudaHostRegister", slowly)
    store, _ = make_store(SIZES, verify=verify)
    with pytest.raises(ValueError, match="b3 is corrupt"):
        start(store)
    assert threads[0].startswith("squareq-check")


def test_an_interrupted_start_gives_pinned_memory_back(cudart: FakeCudart, monkeypatch: pytest.MonkeyPatch) -> None:
    store, _ = make_store(SIZES, verify=lambda name: None)

    @contextmanager
    def interrupted(names: Iterable[str]) -> Iterator[None]:
        yield
        assert cudart.ranges
        raise KeyboardInterrupt

    monkeypatch.setattr(store, "checking", interrupted)
    with pytest.raises(KeyboardInterrupt):
        start(store)
    assert cudart.ranges == {}


def test_nothing_is_registered_that_no_copy_reads_from(cudart: FakeCudart) -> None:
    for options in (
        {"backing": "resident"},
        {"backing": "disk"},
        {"keep_resident": ["b0", "b1", "b2", "b3"]},
    ):
        store, _ = make_store(SIZES, **options)  # type: ignore[arg-type]
        start(store).shutdown()
    assert cudart.calls == 0


def test_a_refused_unregistration_is_a_warning(cudart: FakeCudart) -> None:
    runtime = start(make_store(SIZES)[0])
    cudart.ranges.clear()
    with pytest.warns(UserWarning, match="did not unregister 1427 bytes of host memory: error 713"):
        runtime.shutdown()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        runtime.shutdown()
