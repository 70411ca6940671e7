"""What one step moved, waited for and held. Recording is cheap; times are worked out on demand."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

from squareq_fx.runtime.carriers import Transfer
from squareq_fx.runtime.engines import Mark

__all__ = ["EventKind", "MemoryEvent", "StepRecorder", "StepReport", "StepTiming"]

EventKind = Literal["prefetch", "load", "keep", "evict", "drop"]

_NOISE_MS = 0.01


@dataclass(frozen=True)
class MemoryEvent:
    """One change of what is on the device.

    Args:
        t: host seconds since the step began. With CUDA the host runs ahead; the order is that of the program.
        kind: "drop" is a prefetch that nobody loaded, "keep" an eviction that leaves the bytes for the next step.
        bytes_in_use: streamed bytes claimed after the event, resident ones not counted.
    """

    t: float
    kind: EventKind
    block: str
    visit: int
    bytes_in_use: int


@dataclass(frozen=True)
class StepTiming:
    """Milliseconds, on the device's clock where it has one.

    Args:
        step_ms: from entering the step to leaving it, on the compute stream.
        copy_ms: sum over the copies this step issued; with a reader thread the reading is part of it.
        stall_ms: how long the compute stream stood waiting for a copy.
        compute_ms: the rest of the step.
        stalls: loads that the compute stream had to wait for; a prefetch that was finished in time is none.
    """

    step_ms: float
    copy_ms: float
    stall_ms: float
    compute_ms: float
    stalls: int


@dataclass(frozen=True)
class _Arrival:
    mark: Mark
    transfer: Transfer
    is_miss: bool


@dataclass(frozen=True)
class StepReport:
    """One step. Everything but `timing` is known without waiting for the device.

    Args:
        index: the runtime's count of steps, from 0.
        bytes_to_device: bytes of the copies this step issued, host to device, offloaded activations included.
        bytes_to_host: bytes of activations copied to the host; weights never are.
        loads, evictions, prefetches: how many. Resident blocks are loaded and evicted, never prefetched.
        prefetch_hits: loads of streamed blocks whose copy had been issued before. One that had not finished
            by then is a hit and a stall.
        prefetch_misses: the other loads of streamed blocks; each is a stall.
        dropped: prefetches that nobody loaded.
        peak_bytes_in_use: most streamed bytes claimed at a time.
        arena_bytes, resident_bytes: device memory held throughout.
        host_bytes: host memory held: pinned ranges, packed segments, staging buffers.
        events: in program order.
    """

    index: int
    bytes_to_device: int
    bytes_to_host: int
    loads: int
    evictions: int
    prefetches: int
    prefetch_hits: int
    prefetch_misses: int
    dropped: int
    peak_bytes_in_use: int
    arena_bytes: int
    resident_bytes: int
    host_bytes: int
    events: tuple[MemoryEvent, ...] = field(repr=False)
    _span: tuple[Mark, Mark] = field(repr=False)
    _transfers: tuple[Transfer, ...] = field(repr=False)
    _arrivals: tuple[_Arrival, ...] = field(repr=False)

    @cached_property
    def timing(self) -> StepTiming:
        """Waits for the step, and the copies it issued, to be over on the device; later calls are free."""
        start, end = self._span
        step_ms = _elapsed(start, end)
        waits = [(a.is_miss, _waited(a)) for a in self._arrivals]
        stall_ms = sum(ms for _, ms in waits)
        return StepTiming(
            step_ms=step_ms,
            copy_ms=sum(_elapsed(t.started, t.copied) for t in self._transfers),
            stall_ms=stall_ms,
            compute_ms=max(0.0, step_ms - stall_ms),
            stalls=sum(is_miss or ms > _NOISE_MS for is_miss, ms in waits),
        )

    @property
    def device_bytes(self) -> int:
        """Most device memory held for weights at a time."""
        return self.resident_bytes + max(self.arena_bytes, self.peak_bytes_in_use)


class StepRecorder:
    """Collects one step; `report` freezes it."""

    def __init__(self, index: int, start: Mark, bytes_in_use: int, bytes_to_device: int) -> None:
        self.index = index
        self.bytes_in_use = bytes_in_use
        self._peak = bytes_in_use
        self._bytes_to_device = bytes_to_device
        self._bytes_to_host = 0
        self._start = start
        self._began = time.perf_counter()
        self._events: list[MemoryEvent] = []
        self._transfers: list[Transfer] = []
        self._arrivals: list[_Arrival] = []

    def event(self, kind: EventKind, block: str, visit: int, change: int = 0) -> None:
        """`change`: how many streamed bytes were claimed, or released if negative."""
        self.bytes_in_use += change
        self._peak = max(self._peak, self.bytes_in_use)
        moment = time.perf_counter() - self._began
        self._events.append(MemoryEvent(moment, kind, block, visit, self.bytes_in_use))

    def sent(self, transfer: Transfer) -> None:
        self._bytes_to_device += transfer.nbytes
        self._transfers.append(transfer)

    def returned(self, nbytes: int) -> None:
        """Activations that were copied to the host."""
        self._bytes_to_host += nbytes

    def fetched(self, nbytes: int) -> None:
        """Activations that were copied back to the device."""
        self._bytes_to_device += nbytes

    def arrived(self, mark: Mark, transfer: Transfer, *, is_miss: bool) -> None:
        """The compute stream got to a load at `mark` and must not go on before `transfer` is there."""
        self._arrivals.append(_Arrival(mark, transfer, is_miss))

    def report(self, end: Mark, *, arena_bytes: int, resident_bytes: int, host_bytes: int) -> StepReport:
        kinds = [event.kind for event in self._events]
        misses = sum(arrival.is_miss for arrival in self._arrivals)
        return StepReport(
            index=self.index,
            bytes_to_device=self._bytes_to_device,
            bytes_to_host=self._bytes_to_host,
            loads=kinds.count("load"),
            evictions=kinds.count("evict"),
            prefetches=kinds.count("prefetch"),
            prefetch_hits=len(self._arrivals) - misses,
            prefetch_misses=misses,
            dropped=kinds.count("drop"),
            peak_bytes_in_use=self._peak,
            arena_bytes=arena_bytes,
            resident_bytes=resident_bytes,
            host_bytes=host_bytes,
            events=tuple(self._events),
            _span=(self._start, end),
            _transfers=tuple(self._transfers),
            _arrivals=tuple(self._arrivals),
        )


def _elapsed(start: Mark | None, end: Mark | None) -> float:
    if start is None or end is None:  # a copy that was cancelled, or not issued yet
        return 0.0
    end.synchronize()
    return start.elapsed_time(end)


def _waited(arrival: _Arrival) -> float:
    arrival.mark.synchronize()
    return max(0.0, _elapsed(arrival.mark, arrival.transfer.copied))
