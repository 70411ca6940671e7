"""Every error this package raises on purpose. Each says what is wrong, where, and what to do."""

from __future__ import annotations

from collections.abc import Iterable

__all__ = [
    "AdapterError",
    "BindingError",
    "CaptureError",
    "PassError",
    "RuntimeStateError",
    "SlabError",
    "SquareQError",
    "VerificationError",
]


class SquareQError(Exception):
    """Base of all errors of this package."""


class _FileError(SquareQError):
    """A file is not what it should be.

    Args:
        message: one line, what failed and for which file.
        problems: every single fault found, one line each; all of them are reported at once.
    """

    def __init__(self, message: str, problems: Iterable[str] = ()) -> None:
        self.problems: tuple[str, ...] = tuple(problems)
        super().__init__("\n  - ".join([message, *self.problems]))


class SlabError(_FileError):
    """A slab cannot be built, read or trusted."""


class AdapterError(_FileError):
    """A low-rank adapter cannot be read from or written to a file."""


class CaptureError(SquareQError):
    """The model could not be captured as a graph, or it is not known what to call it with."""


class PassError(SquareQError):
    """A pass cannot do what it promises on this graph."""


class VerificationError(PassError):
    """A pass returned a graph that breaks the rules of the IR."""


class BindingError(SquareQError, TypeError):
    """A compiled module was called with arguments the captured graph does not cover."""


class RuntimeStateError(SquareQError, RuntimeError):
    """A load, evict or prefetch ran without weights, twice, or after shutdown."""
