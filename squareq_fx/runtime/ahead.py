"""A device that is started on a thread of its own, beside what else has to be done before the first step."""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch

from squareq_fx.runtime.device import Device
from squareq_fx.runtime.engines import Engine, Mark

__all__ = ["StartedAhead"]

_JOIN_SECONDS = 30.0


class StartedAhead:
    """Runs `start` at once, on a thread.

    Args:
        engine: made by the caller's thread, so that the device that is current there counts.
        start: `start_device` with everything but its engine.
    """

    def __init__(self, engine: Engine, start: Callable[[Callable[[], Engine]], Device]) -> None:
        self._engine = engine
        self._start = start
        self._device: Device | None = None
        self._filled: Mark | None = None
        self._error: BaseException | None = None
        self._lock = threading.Lock()
        self._abandoned = False
        # A daemon, so that it cannot keep the interpreter alive; whoever holds this abandons it at exit.
        self._thread = threading.Thread(target=self._run, name="squareq-start", daemon=True)
        self._thread.start()

    def device(self) -> Device:
        """Waits for the start; the current stream waits for its copies. Raises what the start raised."""
        self._thread.join()
        error, self._error = self._error, None
        if error is not None:
            try:
                raise error
            finally:
                del error  # its traceback would keep all memory of these frames alive
        assert self._device is not None and self._filled is not None, "taken or abandoned before"
        device, self._device = self._device, None
        device.engine.compute_after(self._filled)
        return device

    def abandon(self) -> None:
        """Ends what was started, unless it was taken, and gives host and device memory back; safe to call twice."""
        with self._lock:
            self._abandoned = True
        # A garbage collection that finds a forgotten runtime may run on this very thread, which then clears up at its end.
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout=_JOIN_SECONDS)
        if not self._thread.is_alive():
            self._close()

    def fail(self, error: BaseException) -> None:
        """There will be no device; whoever asks for it gets this error."""
        self._error = error

    def _run(self) -> None:
        try:
            self._engine.enter_thread()
            with torch.no_grad():
                self._device = self._start(lambda: self._engine)
            self._filled = self._engine.mark_compute()
        except BaseException as error:
            self.fail(error)
        with self._lock:
            if self._abandoned:
                self._close()

    def _close(self) -> None:
        device, self._device = self._device, None
        self._error = None
        if device is not None and device.carrier is not None:
            device.carrier.close()
