"""Python's garbage collector, out of the way while many objects are made that all stay."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

__all__ = ["paused", "resumed"]

_PAUSED: ContextVar[bool] = ContextVar("squareq_fx_collector_paused", default=False)


@contextmanager
def paused() -> Iterator[None]:
    """No collection while this is entered, except inside `resumed`.

    With torch and diffusers imported one pass over all objects takes as long as reading the graph of a large model, which
    leaves nothing to collect. It is put off, not saved. For steps of a second or so; a collector that is off is left alone.
    """
    if not gc.isenabled():
        yield
        return
    token = _PAUSED.set(True)
    gc.disable()
    try:
        yield
    finally:
        _PAUSED.reset(token)
        gc.enable()


@contextmanager
def resumed() -> Iterator[None]:
    """Collections as always while this is entered, inside `paused`: for steps that take long and make garbage."""
    if not _PAUSED.get():
        yield
        return
    gc.enable()
    try:
        yield
    finally:
        gc.disable()
