"""How a segment's bytes get from the host to the device: straight from pinned memory, or read by a thread."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Protocol

import torch

from squareq_fx.errors import RuntimeStateError
from squareq_fx.runtime.engines import Engine, Mark
from squareq_fx.runtime.store import WeightStore

__all__ = ["Carrier", "DirectCarrier", "StagedCarrier", "Transfer"]

_JOIN_SECONDS = 30.0


class Transfer:
    """One segment on its way. `started` and `copied` are marks on the copy stream, None until issued."""

    __slots__ = ("_error", "_issued", "cancelled", "copied", "nbytes", "started")

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self.started: Mark | None = None
        self.copied: Mark | None = None
        self.cancelled = False
        self._error: BaseException | None = None
        self._issued = threading.Event()

    def finish(self, started: Mark, copied: Mark) -> None:
        self.started, self.copied = started, copied
        self._issued.set()

    def fail(self, error: BaseException) -> None:
        self._error = error
        self._issued.set()

    def issued(self, carrier: Carrier) -> Mark:
        """Blocks until the copy has been issued. Raises what went wrong with it, wherever that happened."""
        while not self._issued.wait(timeout=1.0):
            if not carrier.is_alive() and not self._issued.is_set():
                raise RuntimeStateError("the runtime was shut down while a load was waiting for its bytes")
        error, self._error = self._error, None
        if error is not None:
            try:
                raise error
            finally:
                del error  # here or in self, its traceback would keep all memory of these frames alive
        if self.copied is None:
            raise RuntimeStateError("the copy failed before; what went wrong was raised then")
        return self.copied


class Carrier(Protocol):
    def send(self, name: str, destination: torch.Tensor, after: Sequence[Mark]) -> Transfer:
        """Starts copying a segment into uint8 [nbytes] after the marks. Copies keep the calls' order."""

    def is_alive(self) -> bool: ...

    def host_bytes(self) -> int:
        """Host memory in use, the store's included."""

    def close(self) -> None:
        """Ends all copies and gives the host memory back; safe to call twice and from any thread."""


class DirectCarrier:
    """Copies from memory that the device reads by itself: the store was pinned, and closing unpins it."""

    def __init__(self, store: WeightStore, engine: Engine) -> None:
        self._store = store
        self._engine = engine
        self._open = True

    def send(self, name: str, destination: torch.Tensor, after: Sequence[Mark]) -> Transfer:
        for mark in after:
            self._engine.copy_after(mark)
        source = self._store.host_view(name)
        transfer = Transfer(destination.numel())
        started = self._engine.mark_copy()
        self._engine.copy(destination, source)
        transfer.finish(started, self._engine.mark_copy())
        return transfer

    def is_alive(self) -> bool:
        return self._open

    def host_bytes(self) -> int:
        return self._store.host_bytes()

    def close(self) -> None:
        if not self._open:
            return
        self._open = False
        if self._engine.can_pin:
            try:
                self._engine.synchronize()
            finally:
                self._store.unpin()


@dataclass
class _Request:
    """A transfer to serve. Whoever waits for it may free the destination at once, so it is let go of first."""

    name: str
    destination: torch.Tensor | None
    after: Sequence[Mark]
    transfer: Transfer

    def finish(self, started: Mark, copied: Mark) -> None:
        self.destination = None
        self.transfer.finish(started, copied)

    def fail(self, error: BaseException) -> None:
        self.destination = None
        self.transfer.fail(error)


@dataclass
class _Slot:
    memory: torch.Tensor
    in_use_until: Mark | None = None


class StagedCarrier:
    """A thread gathers segments, chunk by chunk, into a ring of pinned buffers and issues the copies.

    Args:
        names: the segments it is made for.
        chunk_bytes: size of one buffer; never more than the largest of these segments.
        slots: how many buffers.
    """

    def __init__(
        self, store: WeightStore, engine: Engine, names: Iterable[str], *, chunk_bytes: int, slots: int
    ) -> None:
        self._store = store
        self._engine = engine
        largest = max(store.segments[name].nbytes for name in names)
        self._chunk_bytes = max(1, min(chunk_bytes, largest))
        staging = engine.stage(self._chunk_bytes * slots)
        self._slots = [_Slot(memory) for memory in staging.split(self._chunk_bytes)]
        self._next_slot = 0
        self._stopping = False
        self._requests: SimpleQueue[_Request | None] = SimpleQueue()
        # A daemon, so that a forgotten runtime cannot keep the interpreter alive; it is closed at exit.
        self._thread = threading.Thread(target=self._run, name="squareq-reader", daemon=True)
        self._thread.start()

    def send(self, name: str, destination: torch.Tensor, after: Sequence[Mark]) -> Transfer:
        transfer = Transfer(destination.numel())
        self._requests.put(_Request(name, destination, after, transfer))
        return transfer

    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def host_bytes(self) -> int:
        return self._store.host_bytes() + sum(slot.memory.numel() for slot in self._slots)

    def close(self) -> None:
        self._stopping = True
        self._requests.put(None)
        # A garbage collection that finds a forgotten runtime may run on the reader itself.
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout=_JOIN_SECONDS)

    def _run(self) -> None:
        self._engine.enter_thread()
        while self._serve_next():
            pass
        self._engine.synchronize()  # nothing may still be reading the staging memory when it goes

    def _serve_next(self) -> bool:
        request = self._requests.get()
        if request is None:
            return False
        try:
            self._serve(request)
        except BaseException as error:  # raised again in the load that waits for this transfer
            request.fail(error)
        return True

    def _serve(self, request: _Request) -> None:
        # Also for a request that is not served any more: whoever writes these bytes next relies on the order.
        for mark in request.after:
            self._engine.copy_after(mark)
        if self._is_pointless(request):
            return
        started = self._engine.mark_copy()
        self._store.check(request.name)
        total = request.transfer.nbytes
        for start in range(0, total, self._chunk_bytes):
            if self._is_pointless(request):
                return
            slot = self._slots[self._next_slot]
            self._next_slot = (self._next_slot + 1) % len(self._slots)
            if slot.in_use_until is not None:
                slot.in_use_until.synchronize()
            part = slot.memory[: min(self._chunk_bytes, total - start)]
            self._store.gather(request.name, part, start)
            assert request.destination is not None, "not ended yet"
            self._engine.copy(request.destination[start : start + part.numel()], part)
            slot.in_use_until = self._engine.mark_copy()
        request.finish(started, self._engine.mark_copy())

    def _is_pointless(self, request: _Request) -> bool:
        if not (self._stopping or request.transfer.cancelled):
            return False
        # Not raised here: a traceback would keep these frames alive for as long as the telemetry is kept.
        reason = f"the copy of {request.name!r} was cancelled: its step ended or the runtime was shut down"
        request.fail(RuntimeStateError(reason))
        return True
