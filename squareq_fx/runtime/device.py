"""What a started runtime holds on its device, and what it holds there for good."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from squareq_fx.runtime.carriers import Carrier, DirectCarrier, StagedCarrier
from squareq_fx.runtime.engines import Engine
from squareq_fx.runtime.segments import packed_offsets
from squareq_fx.runtime.store import WeightStore

__all__ = ["Device", "start_device"]


@dataclass(frozen=True)
class Device:
    """
    Args:
        engine: streams and memory of the device.
        arena: uint8 [arena_bytes]; empty if every segment is resident.
        resident: uint8 [nbytes] views of one allocation, by segment.
        resident_bytes: size of that allocation.
        carrier: brings streamed segments; None if there are none. Closing it releases all host memory.
    """

    engine: Engine
    arena: torch.Tensor
    resident: dict[str, torch.Tensor]
    resident_bytes: int
    carrier: Carrier | None


def start_device(
    store: WeightStore,
    make_engine: Callable[[], Engine],
    *,
    arena_bytes: int,
    chunk_bytes: int,
    staging_slots: int,
) -> Device:
    """Allocates, pins, and copies the resident segments. If any of it fails, nothing is left behind."""
    engine = make_engine()
    arena = engine.allocate(arena_bytes if store.streamed else 0)
    offsets, resident_bytes = packed_offsets(store.segments[name] for name in store.resident)
    memory = engine.allocate(resident_bytes)
    resident = {name: memory[start : start + store.segments[name].nbytes] for name, start in offsets.items()}
    carrier: Carrier | None = None
    # The check of one segment takes longer than its copy, and pinning much longer.
    ahead = [*resident, *(store.streamed if store.backing == "host" and engine.can_pin else ())]
    try:
        with store.checking(ahead):
            _fill(resident, store, engine, chunk_bytes, staging_slots)
            carrier = _carrier(store, engine, chunk_bytes, staging_slots) if store.streamed else None
    except BaseException:
        if carrier is not None:
            carrier.close()
        raise
    return Device(engine, arena, resident, resident_bytes, carrier)


def _fill(resident: dict[str, torch.Tensor], store: WeightStore, engine: Engine, chunk_bytes: int, slots: int) -> None:
    """Through pinned buffers where there can be some: from memory that is not pinned the driver copies by itself, and waits."""
    if not resident:
        return
    try:
        carrier = StagedCarrier(store, engine, resident, chunk_bytes=chunk_bytes, slots=slots) if engine.can_pin else None
    except RuntimeError:  # a limit on locked memory
        carrier = None
    if carrier is None:
        for name, view in resident.items():
            store.check(name)
            store.gather(name, view)
        return
    try:
        for transfer in [carrier.send(name, view, ()) for name, view in resident.items()]:
            engine.compute_after(transfer.issued(carrier))
    finally:
        carrier.close()


def _carrier(store: WeightStore, engine: Engine, chunk_bytes: int, slots: int) -> Carrier:
    if store.backing == "host" and (not engine.can_pin or store.pin()):
        return DirectCarrier(store, engine)
    return StagedCarrier(store, engine, store.streamed, chunk_bytes=chunk_bytes, slots=slots)
