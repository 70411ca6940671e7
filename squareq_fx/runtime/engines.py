"""The device: memory, one copy stream beside the compute stream, and marks (events) that order and time them.

Everything above this file is the same with and without CUDA. Work on the copy stream happens in the order it
is issued; on the CPU both streams are the caller's own thread and every wait is already over.
"""

from __future__ import annotations

import time
from typing import Any, Protocol

import torch

from squareq_fx.errors import RuntimeStateError

__all__ = ["CpuEngine", "CudaEngine", "Engine", "HostMark", "Mark", "engine_for"]


class Mark(Protocol):
    """A point in a stream, in the terms of `torch.cuda.Event`."""

    def synchronize(self) -> None:
        """Blocks the host until the stream has passed the mark."""

    def elapsed_time(self, end_event: Any) -> float:
        """Milliseconds from this mark to another; negative if that came first. Both must be passed."""


class Engine(Protocol):
    device: torch.device
    can_pin: bool

    def enter_thread(self) -> None:
        """To be called by a thread other than the one that made the engine before it uses it; its current stream is its own."""

    def allocate(self, nbytes: int) -> torch.Tensor:
        """uint8 [nbytes] on the device that either stream may write at once; lives as long as the engine."""

    def allocate_for_copy(self, nbytes: int) -> torch.Tensor:
        """uint8 [nbytes] that the copy stream may write at once.

        Before the last reference goes, the copy stream must be made to wait for its readers (`copy_after`).
        """

    def stage(self, nbytes: int) -> torch.Tensor:
        """uint8 [nbytes] of host memory to copy from."""

    def copy(self, destination: torch.Tensor, source: torch.Tensor) -> None:
        """Copies on the copy stream without waiting; the source stays as it is until a later `mark_copy`."""

    def to_host(self, x: torch.Tensor) -> tuple[torch.Tensor, Mark]:
        """A copy of x in host memory, made beside the current stream's further work; the mark says when it is there."""

    def from_host(self, host: torch.Tensor, after: Mark) -> tuple[torch.Tensor, Mark]:
        """A copy on the device, made on the copy stream after the mark; to be read after the mark that is returned."""

    def mark_copy(self) -> Mark: ...

    def mark_compute(self) -> Mark: ...

    def copy_after(self, mark: Mark) -> None:
        """What the copy stream is given from now on waits for the mark."""

    def compute_after(self, mark: Mark) -> None:
        """What the current stream is given from now on waits for the mark."""

    def synchronize(self) -> None:
        """Blocks the host until all work given to the device is done."""


class HostMark:
    """A moment of the host's clock; always passed."""

    __slots__ = ("seconds",)

    def __init__(self) -> None:
        self.seconds = time.perf_counter()

    def synchronize(self) -> None:
        return

    def elapsed_time(self, end_event: HostMark) -> float:
        return (end_event.seconds - self.seconds) * 1e3


class CpuEngine:
    """Plain copies, done when `copy` returns. The arena is really copied into, so a wrong schedule shows."""

    can_pin = False

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def enter_thread(self) -> None:
        return

    def allocate(self, nbytes: int) -> torch.Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, device=self.device)

    def allocate_for_copy(self, nbytes: int) -> torch.Tensor:
        return self.allocate(nbytes)

    def stage(self, nbytes: int) -> torch.Tensor:
        return self.allocate(nbytes)

    def copy(self, destination: torch.Tensor, source: torch.Tensor) -> None:
        destination.copy_(source)

    def to_host(self, x: torch.Tensor) -> tuple[torch.Tensor, HostMark]:
        return _empty_like(x, self.device).copy_(x), HostMark()

    def from_host(self, host: torch.Tensor, after: Mark) -> tuple[torch.Tensor, HostMark]:
        return _empty_like(host, self.device).copy_(host), HostMark()

    def mark_copy(self) -> HostMark:
        return HostMark()

    def mark_compute(self) -> HostMark:
        return HostMark()

    def copy_after(self, mark: Mark) -> None:
        return

    def compute_after(self, mark: Mark) -> None:
        return

    def synchronize(self) -> None:
        return


class CudaEngine:
    """One CUDA device. Made lazily: the first step, or a start ahead of it, is what starts CUDA."""

    can_pin = True

    def __init__(self, device: torch.device) -> None:
        index = torch.cuda.current_device() if device.index is None else device.index
        self.device = torch.device("cuda", index)
        self._stream = torch.cuda.current_stream(self.device)
        self._copy_stream = torch.cuda.Stream(self.device)
        self._host_stream = torch.cuda.Stream(self.device)  # the bus works both ways at once

    def enter_thread(self) -> None:
        torch.cuda.set_device(self.device)
        torch.cuda.set_stream(torch.cuda.Stream(self.device))  # what waits here does not hold up the stream that computes

    def allocate(self, nbytes: int) -> torch.Tensor:
        with torch.cuda.stream(self._stream):  # to which the memory goes back
            memory = torch.empty(nbytes, dtype=torch.uint8, device=self.device)
        # The allocator may hand out bytes that kernels still queued on that stream are using.
        self._copy_stream.wait_stream(self._stream)
        return memory

    def allocate_for_copy(self, nbytes: int) -> torch.Tensor:
        with torch.cuda.stream(self._copy_stream):
            return torch.empty(nbytes, dtype=torch.uint8, device=self.device)

    def stage(self, nbytes: int) -> torch.Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, device="cpu", pin_memory=True)

    def copy(self, destination: torch.Tensor, source: torch.Tensor) -> None:
        with torch.cuda.stream(self._copy_stream):
            destination.copy_(source, non_blocking=True)

    def to_host(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.cuda.Event]:
        host = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cpu", pin_memory=True)
        self._host_stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._host_stream):
            host.copy_(x, non_blocking=True)
        x.record_stream(self._host_stream)
        return host, self._mark(self._host_stream)

    def from_host(self, host: torch.Tensor, after: Any) -> tuple[torch.Tensor, torch.cuda.Event]:
        self._copy_stream.wait_event(after)
        with torch.cuda.stream(self._copy_stream):
            x = _empty_like(host, self.device).copy_(host, non_blocking=True)
        x.record_stream(torch.cuda.current_stream(self.device))
        return x, self.mark_copy()

    def mark_copy(self) -> torch.cuda.Event:
        return self._mark(self._copy_stream)

    def mark_compute(self) -> torch.cuda.Event:
        return self._mark(torch.cuda.current_stream(self.device))

    def _mark(self, stream: torch.cuda.Stream) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record(stream)
        return event

    def copy_after(self, mark: Any) -> None:
        self._copy_stream.wait_event(mark)

    def compute_after(self, mark: Any) -> None:
        torch.cuda.current_stream(self.device).wait_event(mark)

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.device)


def _empty_like(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device)


def engine_for(device: torch.device) -> Engine:
    """Raises RuntimeStateError for a device that is neither the CPU nor CUDA."""
    if device.type == "cpu":
        return CpuEngine(device)
    if device.type == "cuda":
        return CudaEngine(device)
    raise RuntimeStateError(f"weights can be streamed to cpu and cuda devices, not to {device}")
