"""A start before the first step: the same bytes, errors where the step is, nothing left whenever it ends."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Iterator
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from runtime_support import BACKINGS, SimEngine, make_store, read, ring_schedule, run_step

from squareq_fx.errors import RuntimeStateError, SlabError
from squareq_fx.runtime import Runtime

pytestmark = pytest.mark.timeout(60)

SIZES = (300, 511, 512, 40)


def left_behind() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name in ("squareq-start", "squareq-reader")]


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    before = len(left_behind())
    yield
    gc.collect()
    assert len(left_behind()) <= before


@given(
    backing=st.sampled_from(BACKINGS),
    keep=st.booleans(),
    can_pin=st.booleans(),
    seed=st.integers(0, 99),
    steps=st.integers(1, 3),
)
def test_every_load_has_its_own_bytes(backing: str, keep: bool, can_pin: bool, seed: int, steps: int) -> None:
    store, truth = make_store(SIZES, backing, keep_resident=("b1",) if keep else ())
    acts, arena_bytes = ring_schedule(list(truth), 512, 1)
    engines: list[SimEngine] = []

    def make_engine(device: torch.device) -> SimEngine:
        engines.append(SimEngine(device, seed=seed, can_pin=can_pin and backing != "host"))
        return engines[-1]

    runtime = Runtime(store, arena_bytes=arena_bytes, chunk_bytes=128, make_engine=make_engine)
    runtime.start_ahead()
    runtime.start_ahead()
    seen: list[tuple[str, bytes]] = []
    for _ in range(steps):
        # The copy of the weights is read when the simulated compute stream comes to it, and not before.
        run_step(runtime, acts, lambda block, weights: engines[0].compute(partial(_note, seen, block, weights)))
        engines[0].synchronize()
    assert len(engines) == 1 and "squareq-start" in engines[0].threads
    assert seen == [(act.block, truth[act.block]) for _ in range(steps) for act in acts if act.kind == "load"]
    runtime.shutdown()


def _note(seen: list[tuple[str, bytes]], block: str, weights: torch.Tensor) -> None:
    seen.append((block, read(weights)))


@pytest.mark.parametrize("backing", BACKINGS)
def test_the_report_of_the_first_step_counts_what_was_filled_ahead(backing: str) -> None:
    store, truth = make_store(SIZES, backing, keep_resident=("b0",))
    acts, arena_bytes = ring_schedule(list(truth), 512, 1)
    reports = []
    for ahead in (False, True):
        runtime = Runtime(store, arena_bytes=arena_bytes)
        if ahead:
            runtime.start_ahead()
        run_step(runtime, acts, lambda block, weights: None)
        assert runtime.last_step is not None
        last = runtime.last_step
        reports.append((last.bytes_to_device, last.resident_bytes, last.arena_bytes, last.host_bytes))
        runtime.shutdown()
    assert reports[0] == reports[1]


def test_what_goes_wrong_is_raised_by_the_first_step_and_the_second_tries_again() -> None:
    broken = ["b1"]

    def verify(name: str) -> None:
        if name in broken:
            raise SlabError(f"segment {name} is damaged")

    store, truth = make_store(SIZES, "resident", verify=verify)
    acts, _ = ring_schedule(list(truth), None, 0)
    runtime = Runtime(store)
    runtime.start_ahead()
    with pytest.raises(SlabError, match="b1 is damaged"), runtime.step():
        pytest.fail("a step began")
    with pytest.raises(SlabError, match="b1 is damaged"), runtime.step():
        pytest.fail("a step began")
    broken.clear()
    run_step(runtime, acts, lambda block, weights: None if read(weights) == truth[block] else pytest.fail(block))
    runtime.shutdown()


@pytest.mark.parametrize("backing", BACKINGS)
@pytest.mark.parametrize("forgotten", [False, True])
def test_ended_before_the_first_step(backing: str, forgotten: bool) -> None:
    """By `shutdown`, or because nobody holds it any more; while the start is still under way."""
    going = threading.Event()

    def verify(name: str) -> None:
        going.wait(10)

    store, _ = make_store(SIZES, backing, keep_resident=("b0",), verify=verify)
    engines: list[SimEngine] = []
    runtime = Runtime(store, arena_bytes=2048, make_engine=lambda device: engines.append(SimEngine(device)) or engines[0])  # type: ignore[func-returns-value]
    runtime.start_ahead()
    watched = weakref.ref(runtime)
    threading.Timer(0.1, going.set).start()
    if forgotten:
        del runtime
        gc.collect()
        assert watched() is None
    else:
        runtime.shutdown()
        with pytest.raises(RuntimeStateError, match="was shut down"):
            runtime.start_ahead()
        with pytest.raises(RuntimeStateError, match="was shut down"), runtime.step():
            pytest.fail("a step began")
    assert "squareq-start" not in left_behind()


def test_a_start_after_the_first_step_does_nothing() -> None:
    store, truth = make_store(SIZES)
    acts, arena_bytes = ring_schedule(list(truth), 512, 1)
    runtime = Runtime(store, arena_bytes=arena_bytes)
    run_step(runtime, acts, lambda block, weights: None)
    before = threading.active_count()
    runtime.start_ahead()
    assert threading.active_count() == before
    run_step(runtime, acts, lambda block, weights: None if read(weights) == truth[block] else pytest.fail(block))
    runtime.shutdown()
