"""Claims on device memory: who gets which bytes, when the copy starts, and what gives way to what."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from squareq_fx.errors import RuntimeStateError
from squareq_fx.runtime.arena import ArenaMap
from squareq_fx.runtime.carriers import Transfer
from squareq_fx.runtime.device import Device
from squareq_fx.runtime.engines import Mark
from squareq_fx.runtime.telemetry import StepRecorder

__all__ = ["Lease", "Leases", "describe"]


@dataclass
class Lease:
    """A claim of one visit of one block, from its prefetch or load to its eviction.

    Args:
        memory: uint8 [nbytes] on the device, with a version counter of its own.
        step: the last step that asked for it.
        transfer: the copy that fills it; None if the block is resident.
        loaded: the graph holds it now.
        read: it has been loaded at some time, so kernels may be reading it.
    """

    block: str
    visit: int
    offset: int | None
    memory: torch.Tensor
    step: int
    transfer: Transfer | None
    loaded: bool = False
    read: bool = False


class Leases:
    """All claims on one device. `recorder` is that of the current step, told what is sent and dropped."""

    def __init__(self, device: Device) -> None:
        self.recorder: StepRecorder | None = None
        self._device = device
        self._arena: ArenaMap[tuple[str, int], Mark] = ArenaMap(device.arena.numel())
        self._live: dict[tuple[str, int], Lease] = {}

    def loaded(self) -> list[Lease]:
        return [lease for lease in self._live.values() if lease.loaded]

    def bytes_in_use(self) -> int:
        return sum(lease.memory.numel() for lease in self._live.values() if lease.transfer is not None)

    def held(self, block: str, visit: int) -> Lease:
        """Raises RuntimeStateError if that visit is not loaded."""
        lease = self._live.get((block, visit))
        if lease is None or not lease.loaded:
            raise RuntimeStateError(f"evict of {describe(block, visit)}: it is not loaded")
        return lease

    def waiting(self, block: str, visit: int, offset: int | None, step: int) -> Lease | None:
        """The prefetch that waits for this load, if there is one. One left over for another place is dropped.

        Raises:
            RuntimeStateError: that visit is loaded, or this step prefetched it to another place.
        """
        lease = self._live.get((block, visit))
        if lease is None:
            return None
        if lease.loaded:
            raise RuntimeStateError(f"{describe(block, visit)} is loaded already; evict it first")
        if lease.offset == offset:
            return lease
        if lease.step == step:
            raise RuntimeStateError(
                f"{describe(block, visit)} was prefetched to arena offset {lease.offset}, not to {offset}"
            )
        self.drop(lease)
        return None

    def hold_resident(self, block: str, visit: int, step: int) -> Lease:
        """A view of a resident block. Raises RuntimeStateError if that visit is loaded."""
        self.waiting(block, visit, None, step)
        lease = Lease(block, visit, None, self._device.resident[block].data, step, transfer=None, loaded=True)
        self._live[block, visit] = lease
        return lease

    def claim(self, block: str, visit: int, nbytes: int, offset: int | None, step: int) -> Lease:
        """Takes memory for a block and starts the copy. If that fails nothing is claimed.

        Raises:
            RuntimeStateError: the range is outside the arena or in use. A left-over prefetch gives way.
        """
        carrier = self._device.carrier
        assert carrier is not None and self.recorder is not None, (
            "streamed blocks have a carrier, loads a step"
        )
        key = (block, visit)
        after: tuple[Mark, ...] = ()
        if offset is None:
            memory = self._device.engine.allocate_for_copy(nbytes)
        else:
            self._make_room(block, visit, nbytes, offset, step)
            after = self._arena.occupy(key, offset, nbytes)
            memory = self._device.arena[offset : offset + nbytes]
        # `.data` has a version counter of its own: to autograd, writing these bytes again changes no tensor.
        memory = memory.data
        try:
            transfer = carrier.send(block, memory, after)
        except BaseException:
            if offset is not None:
                self._arena.free(key, None)
            raise
        self.recorder.sent(transfer)
        lease = Lease(block, visit, offset, memory, step, transfer)
        self._live[key] = lease
        return lease

    def _make_room(self, block: str, visit: int, nbytes: int, offset: int, step: int) -> None:
        others = [self._live[key] for key in self._arena.occupants(offset, nbytes)]
        for other in others:
            if other.loaded or other.step == step:
                raise RuntimeStateError(
                    f"{describe(block, visit)} is to go to arena bytes {offset} to {offset + nbytes}, where "
                    f"{describe(other.block, other.visit)} still is; evict that first"
                )
        for other in others:
            self.drop(other)

    def release(self, lease: Lease) -> None:
        """Ends a claim. Work queued on the current stream may still be reading the memory."""
        del self._live[lease.block, lease.visit]
        self._give_back(lease)

    def keep(self, lease: Lease, step: int) -> None:
        """The graph holds it no longer, but its bytes stay until another claim wants them or a step does not ask for it."""
        if lease.transfer is None:
            self.release(lease)
        else:
            lease.loaded, lease.step = False, step

    def drop(self, lease: Lease) -> None:
        """Ends a claim that nobody holds."""
        assert lease.transfer is not None and self.recorder is not None
        lease.transfer.cancelled = True
        # A shutdown on another thread may have ended it before.
        if self._live.get((lease.block, lease.visit)) is lease:
            self.release(lease)
            self.recorder.event("drop", lease.block, lease.visit, -lease.memory.numel())

    def drop_left_over(self, step: int) -> None:
        """Drops the prefetches that `step` has not asked for."""
        for lease in list(self._live.values()):
            if not lease.loaded and lease.step != step:
                self.drop(lease)

    def forget_all(self) -> None:
        """Ends every claim, after an error. What was queued still runs, and is waited for as always."""
        leases, self._live = list(self._live.values()), {}
        for lease in leases:
            if lease.transfer is not None and not lease.read:
                lease.transfer.cancelled = True
        for lease in leases:
            self._give_back(lease)

    def _give_back(self, lease: Lease) -> None:
        if lease.transfer is None:
            return
        # Memory that was never handed out is the copy stream's alone, and that keeps its order by itself.
        mark = self._device.engine.mark_compute() if lease.read else None
        if lease.offset is not None:
            self._arena.free((lease.block, lease.visit), mark)
        elif mark is not None:
            self._device.engine.copy_after(mark)  # the allocator gives these bytes to the copy stream again


def describe(block: str, visit: int) -> str:
    """A visit of a block, as messages name it."""
    return f"{block!r} (visit {visit})"
