"""Which bytes of the arena are whose, and what must have finished before freed bytes are written again."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Generic, TypeVar

from squareq_fx.errors import RuntimeStateError
from squareq_fx.runtime.segments import ALIGNMENT

__all__ = ["ArenaMap"]

K = TypeVar("K", bound=Hashable)
M = TypeVar("M")


@dataclass(frozen=True)
class _Span:
    start: int
    end: int

    def overlaps(self, other: _Span) -> bool:
        return max(self.start, other.start) < min(self.end, other.end)


class ArenaMap(Generic[K, M]):
    """Bookkeeping only: holds no memory and decides nothing; offsets come from the graph.

    Args:
        nbytes: size of the arena.
    """

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self._taken: dict[K, _Span] = {}
        self._freed: dict[_Span, M] = {}

    def occupants(self, offset: int, nbytes: int) -> list[K]:
        """Who holds any byte of [offset, offset + nbytes).

        Raises:
            RuntimeStateError: the range is not aligned or not inside the arena.
        """
        if offset < 0 or offset % ALIGNMENT:
            raise RuntimeStateError(f"arena offset {offset} is not a multiple of {ALIGNMENT}")
        if offset + nbytes > self.nbytes:
            raise RuntimeStateError(
                f"bytes {offset} to {offset + nbytes} do not fit into an arena of {self.nbytes}; "
                "give the runtime at least what the schedule was planned for"
            )
        span = _Span(offset, offset + nbytes)
        return [key for key, taken in self._taken.items() if taken.overlaps(span)]

    def occupy(self, key: K, offset: int, nbytes: int) -> tuple[M, ...]:
        """Takes a range that has no occupant.

        Returns:
            the marks of earlier users of these bytes. They are forgotten here: the caller makes the copy
            stream wait for them, and as that stream keeps its order nothing issued later can overtake them.
        """
        span = _Span(offset, offset + nbytes)
        self._taken[key] = span
        overlapping = [freed for freed in self._freed if freed.overlaps(span)]
        return tuple(self._freed.pop(freed) for freed in overlapping)

    def free(self, key: K, mark: M | None) -> None:
        """Gives a range back. `mark`: when its last reader is done; None if nobody read it."""
        span = self._taken.pop(key)
        if mark is not None:
            self._freed[span] = mark
