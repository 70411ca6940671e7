"""What one step held in the arena, from the runtime's own record of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import fx

from squareq_fx import ops
from squareq_fx.runtime import StepReport

__all__ = ["Residency", "Span", "Timeline", "arena_spans", "timeline_of"]

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
    """One step, or several in a row: `in_use` is (millisecond, bytes held from then on) as recorded, `stays` who held which.

    `starts` has the millisecond at which each step began.
    """

    in_use: tuple[tuple[float, int], ...]
    stays: tuple[Residency, ...]
    arena_bytes: int
    step_ms: float
    starts: tuple[float, ...] = (0.0,)

    @property
    def peak_bytes(self) -> int:
        return max((held for _, held in self.in_use), default=0)


def timeline_of(steps: StepReport | Sequence[StepReport], spans: Mapping[tuple[str, int], Span]) -> Timeline:
    """Arranges the events of a step as stays; of several, such as forward and backward, as if each followed at once.

    A block that one step keeps and a later one loads again has one stay.

    Args:
        steps: what the runtime recorded.
        spans: arena offset and size of each (block, visit) that the graph loads into the arena; blocks that
            stay resident are no guests of the arena and left out.
    """
    reports = steps if isinstance(steps, Sequence) else [steps]
    present: dict[tuple[str, int], tuple[float, float | None]] = {}  # claimed, loaded
    stays: list[Residency] = []
    in_use: list[tuple[float, int]] = []
    starts: list[float] = []
    now = 0.0

    def end(key: tuple[str, int], ms: float) -> None:
        claimed, loaded = present.pop(key, (0.0, None))  # unknown: an earlier step prefetched it
        if key in spans:
            stays.append(Residency(*key, claimed, loaded, ms, *spans[key]))

    for report in reports:
        starts.append(now)
        for event in report.events:
            key, ms = (event.block, event.visit), now + 1000 * event.t
            in_use.append((ms, event.bytes_in_use))
            if event.kind == "prefetch":
                present.setdefault(key, (ms, None))
            elif event.kind == "load":
                claimed, loaded = present.get(key, (ms, None))
                present[key] = (claimed, ms if loaded is None else loaded)
            elif event.kind != "keep":
                end(key, ms)
        now += max(report.timing.step_ms, 1000 * max((e.t for e in report.events), default=0.0))
    for key in list(present):  # kept, or prefetched for the next step
        end(key, now)
    return Timeline(
        in_use=tuple(in_use),
        stays=tuple(sorted(stays, key=lambda stay: (stay.claimed, stay.offset))),
        arena_bytes=max(report.arena_bytes for report in reports),
        step_ms=now,
        starts=tuple(starts),
    )


def arena_spans(*graphs: fx.Graph) -> dict[tuple[str, int], Span]:
    """Arena offset and size of every load node that has a place in the arena, by block and visit."""
    loads = [n for graph in graphs for n in graph.nodes if n.target is ops.load and n.kwargs["offset"] is not None]
    return {(n.args[0], n.kwargs["visit"]): (n.kwargs["offset"], n.kwargs["nbytes"]) for n in loads}
