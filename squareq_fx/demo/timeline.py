"""What one step held in the arena, from the runtime's own record of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from squareq_fx.runtime import StepReport

__all__ = ["Residency", "Span", "Timeline", "timeline_of"]

Span = tuple[int, int]  # arena offset, bytes


@dataclass(frozen=True)
class Residency:
    """One stay of a block's weights in the arena, times in milliseconds from the start of the step.

    Its bytes were claimed at `claimed` (by a prefetch, or else by the load itself), handed to the computation
    at `loaded` (None if that never happened) and given back at `evicted`. `offset` is the arena's.
    """

    name: str
    visit: int
    claimed: float
    loaded: float | None
    evicted: float
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Timeline:
    """One step: `in_use` is (millisecond, bytes held from then on) as recorded, `stays` who held which."""

    in_use: tuple[tuple[float, int], ...]
    stays: tuple[Residency, ...]
    arena_bytes: int
    step_ms: float

    @property
    def peak_bytes(self) -> int:
        return max((held for _, held in self.in_use), default=0)


def timeline_of(report: StepReport, spans: Mapping[tuple[str, int], Span]) -> Timeline:
    """Arranges a step's events as stays.

    Args:
        report: what the runtime recorded.
        spans: arena offset and size of each (block, visit) that the graph loads into the arena; blocks that
            stay resident are no guests of the arena and left out.
    """
    step_ms = max(report.timing.step_ms, 1000 * max((e.t for e in report.events), default=0.0))
    present: dict[tuple[str, int], tuple[float, float | None]] = {}  # claimed, loaded
    stays: list[Residency] = []

    def end(key: tuple[str, int], ms: float) -> None:
        claimed, loaded = present.pop(key, (0.0, None))  # unknown: an earlier step prefetched it
        if key in spans:
            stays.append(Residency(*key, claimed, loaded, ms, *spans[key]))

    for event in report.events:
        key, ms = (event.block, event.visit), 1000 * event.t
        if event.kind == "prefetch":
            present.setdefault(key, (ms, None))
        elif event.kind == "load":
            present[key] = (present.get(key, (ms, None))[0], ms)
        else:
            end(key, ms)
    for key in list(present):  # prefetched for the next step
        end(key, step_ms)
    return Timeline(
        in_use=tuple((1000 * event.t, event.bytes_in_use) for event in report.events),
        stays=tuple(sorted(stays, key=lambda stay: (stay.claimed, stay.offset))),
        arena_bytes=report.arena_bytes,
        step_ms=step_ms,
    )
