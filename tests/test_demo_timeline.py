"""The demo's memory timeline against an independent count over the runtime's events."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from squareq_fx.demo.timeline import timeline_of
from squareq_fx.runtime import MemoryEvent, StepTiming

SIZES = {"a": 256, "b": 512, "c": 1024}
LIVES = [("prefetch", "load", "evict"), ("load", "evict"), ("prefetch", "drop"), ("prefetch",)]


@dataclass(frozen=True)
class Recorded:
    """The parts of a `StepReport` that a timeline is made from."""

    events: tuple[MemoryEvent, ...]
    arena_bytes: int = 4096

    @property
    def timing(self) -> StepTiming:
        return StepTiming(step_ms=1000 * len(self.events), copy_ms=0, stall_ms=0, compute_ms=0, stalls=0)


@st.composite
def steps(draw: st.DrawFn) -> Recorded:
    """A legal step: visits are prefetched or not, loaded or dropped; some are left for the next step."""
    lives = draw(st.lists(st.sampled_from(LIVES), min_size=1, max_size=5))
    queues = {(draw(st.sampled_from("abc")), visit): list(life) for visit, life in enumerate(lives)}
    events: list[MemoryEvent] = []
    held, claimed = 0, set()
    while any(queues.values()):
        block, visit = draw(st.sampled_from(sorted(key for key, queue in queues.items() if queue)))
        kind = queues[block, visit].pop(0)
        if kind in {"evict", "drop"}:
            held -= SIZES[block]
        elif (block, visit) not in claimed:
            claimed.add((block, visit))
            held += SIZES[block]
        events.append(MemoryEvent(float(len(events)), kind, block, visit, held))
    return Recorded(tuple(events))


@given(steps())
def test_stays_add_up_to_the_recorded_bytes_at_every_event(step: Recorded) -> None:
    spans = {(e.block, e.visit): (0, SIZES[e.block]) for e in step.events}
    timeline = timeline_of(step, spans)  # type: ignore[arg-type]
    assert len(timeline.stays) == len(spans)
    for event, (ms, held) in zip(step.events, timeline.in_use):
        assert ms == 1000 * event.t and held == event.bytes_in_use
        assert held == sum(s.nbytes for s in timeline.stays if s.claimed <= ms < s.evicted)
    assert timeline.peak_bytes == max(e.bytes_in_use for e in step.events)


@given(steps())
def test_a_stay_is_loaded_between_its_claim_and_its_end(step: Recorded) -> None:
    timeline = timeline_of(step, {(e.block, e.visit): (0, 256) for e in step.events})  # type: ignore[arg-type]
    loads = {(e.block, e.visit) for e in step.events if e.kind == "load"}
    for stay in timeline.stays:
        assert (stay.loaded is not None) == ((stay.name, stay.visit) in loads)
        assert stay.claimed <= (stay.loaded or stay.claimed) <= stay.evicted <= timeline.step_ms


def test_resident_blocks_are_left_out_and_a_prefetch_of_the_step_before_starts_at_zero() -> None:
    events = (MemoryEvent(1.0, "load", "resident", 0, 256), MemoryEvent(2.0, "evict", "a", 0, 0))
    (stay,) = timeline_of(Recorded(events), {("a", 0): (512, 256)}).stays  # type: ignore[arg-type]
    assert (stay.name, stay.claimed, stay.loaded, stay.evicted, stay.offset) == ("a", 0.0, None, 2000.0, 512)


@given(st.lists(steps(), min_size=1, max_size=3))
def test_several_steps_are_as_one_after_the_other(recorded: list[Recorded]) -> None:
    spans = {(e.block, e.visit): (0, SIZES[e.block]) for step in recorded for e in step.events}
    timeline = timeline_of(recorded, spans)  # type: ignore[arg-type]
    parts = [timeline_of(step, spans) for step in recorded]  # type: ignore[arg-type]
    assert timeline.step_ms == sum(part.step_ms for part in parts) and timeline.starts[0] == 0
    assert timeline.in_use == tuple(
        (start + ms, held) for start, part in zip(timeline.starts, parts) for ms, held in part.in_use
    )
    assert all(0 <= s.claimed <= (s.loaded or s.claimed) <= s.evicted <= timeline.step_ms for s in timeline.stays)


def test_a_block_kept_from_one_step_to_the_next_has_one_stay() -> None:
    forward = Recorded((MemoryEvent(0.0, "prefetch", "a", 0, 256), MemoryEvent(1.0, "load", "a", 0, 256),
                        MemoryEvent(2.0, "keep", "a", 0, 256)))  # fmt: skip
    backward = Recorded((MemoryEvent(0.0, "load", "a", 0, 256), MemoryEvent(1.0, "evict", "a", 0, 0)))
    timeline = timeline_of([forward, backward], {("a", 0): (0, 256)})  # type: ignore[list-item]
    (stay,) = timeline.stays
    assert (stay.claimed, stay.loaded, stay.evicted) == (0.0, 1000.0, 4000.0) and timeline.starts == (0.0, 3000.0)
    (alone,) = timeline_of(forward, {("a", 0): (0, 256)}).stays  # type: ignore[arg-type]
    assert alone.evicted == 3000.0  # nobody took it: it lasts as long as the step
