"""What can go wrong with a stored graph."""

from __future__ import annotations

from squareq_fx.errors import SquareQError

__all__ = ["DamagedError", "UnstorableError"]


class UnstorableError(SquareQError):
    """A graph holds what cannot be written as text; it is compiled anew each time."""


class DamagedError(SquareQError):
    """A stored graph is not what was written, or was written by another version."""
