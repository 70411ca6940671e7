"""load, evict and prefetch: what the graph's explicit weight nodes do when they run."""

from __future__ import annotations

import functools
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ParamSpec, TypeVar

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from squareq_fx.errors import RuntimeStateError
from squareq_fx.runtime.ahead import StartedAhead
from squareq_fx.runtime.device import Device, start_device
from squareq_fx.runtime.engines import Engine, Mark, engine_for
from squareq_fx.runtime.leases import Lease, Leases, describe
from squareq_fx.runtime.store import WeightStore
from squareq_fx.runtime.telemetry import StepRecorder, StepReport

__all__ = ["Runtime"]

P = ParamSpec("P")
R = TypeVar("R")

_POISON = 0xAB


@dataclass(frozen=True)
class _Running:
    device: Device
    leases: Leases
    recorder: StepRecorder


def _out_of_autograds_sight(function: Callable[P, R]) -> Callable[P, R]:
    """Memory that is overwritten again and again is neither an inference tensor nor tracked by autograd."""

    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        if not torch.is_grad_enabled() and not torch.is_inference_mode_enabled():
            return function(*args, **kwargs)  # two contexts cost as much as what they are put around
        with torch.inference_mode(False), torch.no_grad():
            return function(*args, **kwargs)

    return wrapper


class Runtime:
    """Brings weights to one device and takes them away again, at the moments and places the graph names.

    Nothing happens on the device before the first step or `start_ahead`. One step at a time; within it one thread at a time.

    Args:
        store: the segments. Stores and their host memory may be shared between runtimes.
        device: where to; "cuda" without an index is the device that is current then.
        arena_bytes: size of the one device buffer that loads with an offset go to.
        poison: overwrite evicted bytes with 0xAB, so that a use after evict shows. For tests.
        history: how many step reports to keep.
        chunk_bytes, staging_slots: the ring of pinned buffers through which resident segments come once, and
            those read from disk or from memory that cannot be pinned. torch keeps its memory for later rings.
        make_engine: another implementation of the device; the default knows the CPU and CUDA.
    """

    def __init__(
        self,
        store: WeightStore,
        *,
        device: torch.device | str = "cpu",
        arena_bytes: int = 0,
        poison: bool = False,
        history: int = 16,
        chunk_bytes: int = 32 << 20,
        staging_slots: int = 4,
        make_engine: Callable[[torch.device], Engine] = engine_for,
    ) -> None:
        self.store = store
        self.arena_bytes = arena_bytes
        self.history: deque[StepReport] = deque(maxlen=history)
        self._wanted_device = torch.device(device)
        self._poison = poison
        self._make_engine = functools.partial(make_engine, self._wanted_device)
        self._start = functools.partial(
            start_device, store, arena_bytes=arena_bytes, chunk_bytes=chunk_bytes, staging_slots=staging_slots
        )
        self._ahead: StartedAhead | None = None
        self._abandon: weakref.finalize[..., Runtime] | None = None
        self._device: Device | None = None
        self._leases: Leases | None = None
        self._recorder: StepRecorder | None = None
        self._release_host: Callable[[], object] | None = None
        self._closed = False
        self._steps = 0
        self._step_lock = threading.Lock()
        self._on_host: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        self._on_the_way: dict[int, Mark] = {}

    @property
    def device(self) -> torch.device:
        return self._wanted_device if self._device is None else self._device.engine.device

    @property
    def last_step(self) -> StepReport | None:
        """The last step that ended well."""
        return self.history[-1] if self.history else None

    def start_ahead(self) -> None:
        """Do now, on a thread, what the first step would do before anything else: allocate, pin, copy what is resident.

        The first step waits for it and raises what went wrong; the step after a failed one tries again. Nothing is done twice.

        Raises:
            RuntimeStateError: after `shutdown`, or for a device that there is no engine for.
        """
        self._refuse_after_shutdown("a start")
        if self._ahead is None and self._device is None:
            self._ahead = StartedAhead(self._make_engine(), self._start)
            self._abandon = weakref.finalize(self, self._ahead.abandon)  # at exit too

    @contextmanager
    def step(self) -> Iterator[None]:
        """One forward (or backward). Whatever happens inside, the runtime is usable afterwards.

        A prefetch that still waits when the step ends is kept for the next one, and dropped when that does
        not ask for it either, or wants its bytes.

        Raises:
            RuntimeStateError: on entry after `shutdown` or inside another step; on exit if a block is loaded.
        """
        self._refuse_after_shutdown("a step cannot begin")
        if not self._step_lock.acquire(blocking=False):
            raise RuntimeStateError("this runtime is in a step already; give each concurrent module its own")
        try:
            self._begin()
            try:
                yield
                self._end()
            except BaseException:
                if self._leases is not None:
                    self._leases.forget_all()
                raise
        finally:
            self._recorder = None
            self._on_the_way.clear()
            self._step_lock.release()

    @_out_of_autograds_sight
    def load(self, block: str, visit: int, nbytes: int, offset: int | None) -> torch.Tensor:
        """The block's weights, ready for the current stream; copied now unless prefetched or resident.

        Args:
            block: a segment's name.
            visit: tells several uses of one block apart.
            nbytes: the segment's size.
            offset: where in the arena, a multiple of 256; None takes fresh memory instead.

        Returns:
            uint8 [nbytes] on the device, to be given back to `evict` and not to be used after that.

        Raises:
            RuntimeStateError: outside a step, after shutdown, an unknown block, another size, a range outside
                the arena or in use, a visit that is loaded already or was prefetched to another place.
            SlabError, OSError: what verifying or reading the segment raised.
        """
        now = self._running("load", block, visit, nbytes)
        if block in now.device.resident:
            lease = now.leases.hold_resident(block, visit, now.recorder.index)
            now.recorder.event("load", block, visit)
            return lease.memory
        waiting = now.leases.waiting(block, visit, offset, now.recorder.index)
        arrival = now.device.engine.mark_compute()
        lease = waiting or now.leases.claim(block, visit, nbytes, offset, now.recorder.index)
        assert lease.transfer is not None and now.device.carrier is not None, "streamed blocks have both"
        now.recorder.event("load", block, visit, 0 if waiting else nbytes)
        try:
            now.device.engine.compute_after(lease.transfer.issued(now.device.carrier))
        except BaseException:
            now.leases.drop(lease)
            raise
        lease.loaded = lease.read = True
        now.recorder.arrived(arrival, lease.transfer, is_miss=waiting is None)
        return lease.memory

    @_out_of_autograds_sight
    def evict(self, weights: torch.Tensor, block: str, visit: int) -> None:
        """Gives the memory of a load back. Kernels queued on the current stream may still be reading it.

        Raises:
            RuntimeStateError: that visit is not loaded, or `weights` is not what its load returned.
        """
        now = self._running("evict", block, visit)
        lease = self._held(now, "evict", weights, block, visit)
        is_streamed = lease.transfer is not None
        if is_streamed and self._poison:
            lease.memory.fill_(_POISON)
        now.leases.release(lease)
        now.recorder.event("evict", block, visit, -lease.memory.numel() if is_streamed else 0)

    @_out_of_autograds_sight
    def keep(self, weights: torch.Tensor, block: str, visit: int) -> None:
        """Like `evict`, but a load of the same visit to the same place in the next step finds the bytes still there.

        They give way to any other claim on their place in the arena, and go after a step that does not ask for them.

        Raises:
            RuntimeStateError: as for `evict`.
        """
        now = self._running("keep", block, visit)
        now.leases.keep(self._held(now, "keep", weights, block, visit), now.recorder.index)
        now.recorder.event("keep", block, visit)

    def _held(self, now: _Running, what: str, weights: torch.Tensor, block: str, visit: int) -> Lease:
        lease = now.leases.held(block, visit)
        if weights.data_ptr() != lease.memory.data_ptr():
            raise RuntimeStateError(f"{what} of {describe(block, visit)}: not the weights its load returned")
        return lease

    @_out_of_autograds_sight
    def prefetch(self, block: str, visit: int, nbytes: int, offset: int | None) -> None:
        """Starts the copy for a later load with the same arguments. Does nothing for a resident block.

        Raises:
            RuntimeStateError: as for `load`, and if this step prefetched it already.
            SlabError: verifying the segment failed; from a reader thread this comes out of the load.
        """
        now = self._running("prefetch", block, visit, nbytes)
        if block in now.device.resident:
            return
        lease = now.leases.waiting(block, visit, offset, now.recorder.index)
        if lease is None:
            now.leases.claim(block, visit, nbytes, offset, now.recorder.index)
            now.recorder.event("prefetch", block, visit, nbytes)
        elif lease.step != now.recorder.index:
            lease.step = (
                now.recorder.index
            )  # left over from the step before; its bytes are here or on their way
            now.recorder.event("prefetch", block, visit)
        else:
            raise RuntimeStateError(f"{describe(block, visit)} was prefetched already in this step")

    @_out_of_autograds_sight
    def offload(self, x: torch.Tensor) -> torch.Tensor:
        """A copy of an activation in (pinned) host memory, of the same sizes and strides, made while the device goes on.

        Raises:
            RuntimeStateError: outside a step, or after shutdown.
        """
        device, recorder = self._in_step("offload")
        host, mark = device.engine.to_host(x)
        self._on_host[host] = mark
        recorder.returned(x.numel() * x.element_size())
        return host

    @_out_of_autograds_sight
    def fetch(self, host: torch.Tensor) -> torch.Tensor:
        """The way back of what `offload` gave; not to be read before `arrived`.

        Raises:
            RuntimeStateError: outside a step, after shutdown, or `host` is not from `offload`.
        """
        device, recorder = self._in_step("fetch")
        mark = self._on_host.get(host)
        if mark is None:
            raise RuntimeStateError("fetch of a tensor that this runtime has not offloaded")
        x, there = device.engine.from_host(host, mark)
        self._on_the_way[x.data_ptr()] = there
        recorder.fetched(x.numel() * x.element_size())
        return x

    def arrived(self, x: torch.Tensor) -> None:
        """The current stream waits until a fetched tensor is there.

        Raises:
            RuntimeStateError: outside a step, after shutdown, or `x` is not from `fetch`.
        """
        device, _ = self._in_step("arrived")
        if x.numel() and x.data_ptr() not in self._on_the_way:
            raise RuntimeStateError("arrived: this tensor is not on its way to the device")
        mark = self._on_the_way.pop(x.data_ptr(), None)
        if mark is not None:
            device.engine.compute_after(mark)

    def shutdown(self) -> None:
        """Waits for what is under way and releases device and host memory. Idempotent; also runs at exit."""
        self._closed = True
        self._ahead = None
        if self._abandon is not None:
            self._abandon()
        leases, self._leases = self._leases, None
        if leases is not None:
            leases.forget_all()
        try:
            if self._release_host is not None:
                self._release_host()
        finally:
            self._device = None

    @_out_of_autograds_sight
    def _begin(self) -> None:
        filled = 0
        if self._device is None or self._leases is None:
            self._device = self._started()
            self._leases = Leases(self._device)
            filled = sum(view.numel() for view in self._device.resident.values())
            if self._device.carrier is not None:
                self._release_host = weakref.finalize(self, self._device.carrier.close)
        start = self._device.engine.mark_compute()
        self._recorder = StepRecorder(self._steps, start, self._leases.bytes_in_use(), filled)
        self._leases.recorder = self._recorder
        self._steps += 1

    def _started(self) -> Device:
        ahead, self._ahead = self._ahead, None
        if ahead is None:
            return self._start(self._make_engine)
        device = ahead.device()
        if self._abandon is not None:
            self._abandon.detach()
        return device

    def _end(self) -> None:
        device, leases, recorder = self._device, self._leases, self._recorder
        if device is None or leases is None or recorder is None:  # shut down inside the step
            return
        if loaded := leases.loaded():
            names = ", ".join(describe(lease.block, lease.visit) for lease in loaded)
            raise RuntimeStateError(f"the step ended with blocks that were never evicted: {names}")
        leases.drop_left_over(recorder.index)
        host_bytes = self.store.host_bytes() if device.carrier is None else device.carrier.host_bytes()
        self.history.append(
            recorder.report(
                device.engine.mark_compute(),
                arena_bytes=device.arena.numel(),
                resident_bytes=device.resident_bytes,
                host_bytes=host_bytes,
            )
        )

    def _running(self, what: str, block: str, visit: int, nbytes: int | None = None) -> _Running:
        self._refuse_after_shutdown(f"{what} of {describe(block, visit)}")
        if self._recorder is None or self._device is None or self._leases is None:
            raise RuntimeStateError(
                f"{what} of {describe(block, visit)} outside a step; enter `with runtime.step():` first"
            )
        segment = self.store.segment(block)
        if nbytes is not None and nbytes != segment.nbytes:
            raise RuntimeStateError(
                f"{what} of {describe(block, visit)} asks for {nbytes} bytes, the segment has "
                f"{segment.nbytes}; the module was compiled for another slab"
            )
        return _Running(self._device, self._leases, self._recorder)

    def _in_step(self, what: str) -> tuple[Device, StepRecorder]:
        self._refuse_after_shutdown(what)
        if self._recorder is None or self._device is None:
            raise RuntimeStateError(f"{what} outside a step; enter `with runtime.step():` first")
        return self._device, self._recorder

    def _refuse_after_shutdown(self, what: str) -> None:
        if self._closed:
            raise RuntimeStateError(f"{what}: the runtime was shut down; compile the module again")
