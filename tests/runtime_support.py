"""For the runtime's tests: stores with known bytes, and a device whose two streams really run apart."""

from __future__ import annotations

import ctypes
import random
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from squareq_fx.runtime import Piece, Runtime, Segment, WeightStore

BACKINGS = ("resident", "host", "disk")


def make_store(
    sizes: Sequence[int], backing: str = "host", **options: Any
) -> tuple[WeightStore, dict[str, bytes]]:
    """Segments b0, b1, ... and their true bytes; every third lies in `data` whole, the rest is assembled."""
    generator = torch.Generator().manual_seed(sum(sizes) + 7)
    data = torch.randint(0, 256, (sum(sizes) + 64,), dtype=torch.uint8, generator=generator)
    segments, truth, start = [], {}, 16
    for index, size in enumerate(sizes):
        name, half = f"b{index}", size // 2
        whole = data[start : start + size]
        if index % 3 == 0:
            pieces: tuple[Piece, ...] = (Piece(0, size, start),)
        elif index % 3 == 1:  # from memory, and the slab's two halves swapped
            pieces = (Piece(0, half, start + size - half), Piece(half, size - half, start))
            whole = torch.cat([data[start + size - half : start + size], data[start : start + size - half]])
        else:
            pieces = (Piece(half, size - half, whole[half:].clone()), Piece(0, half, start))
        segments.append(Segment(name, size, pieces))
        truth[name] = bytes(whole.tolist())
        start += size
    return WeightStore(data, segments, backing=backing, **options), truth  # type: ignore[arg-type]


def read(weights: torch.Tensor) -> bytes:
    return weights.cpu().numpy().tobytes()


@dataclass(frozen=True)
class Act:
    """One node of a streamed graph."""

    kind: str
    block: str
    visit: int
    offset: int | None


def ring_schedule(order: Sequence[str], slot_bytes: int | None, distance: int) -> tuple[list[Act], int]:
    """As from the schedule pass: visits in order, prefetched `distance` visits ahead into distance + 1 slots.

    Returns:
        the acts, and the size of the arena (0 with `slot_bytes=None`, where nothing has an offset).
    """
    visits = [(block, position) for position, block in enumerate(order)]

    def at(position: int) -> Act:
        offset = None if slot_bytes is None else position % (distance + 1) * slot_bytes
        return Act("prefetch", *visits[position], offset)

    acts = [at(position) for position in range(min(distance, len(order)))]
    for position in range(len(order)):
        if distance > 0 and position + distance < len(order):
            acts.append(at(position + distance))
        here = at(position)
        acts += [Act(kind, here.block, here.visit, here.offset) for kind in ("load", "evict")]
    return acts, (distance + 1) * (slot_bytes or 0)


def run_step(runtime: Runtime, acts: Sequence[Act], use: Callable[[str, torch.Tensor], None]) -> None:
    live: dict[tuple[str, int], torch.Tensor] = {}
    with runtime.step():
        for act in acts:
            nbytes = runtime.store.segments[act.block].nbytes
            if act.kind == "prefetch":
                runtime.prefetch(act.block, act.visit, nbytes, act.offset)
            elif act.kind == "load":
                live[act.block, act.visit] = runtime.load(act.block, act.visit, nbytes, act.offset)
                use(act.block, live[act.block, act.visit])
            else:
                runtime.evict(live.pop((act.block, act.visit)), act.block, act.visit)


class SimMark:
    def __init__(self, engine: SimEngine) -> None:
        self.engine = engine
        self.tick: int | None = None

    def synchronize(self) -> None:
        self.engine.run_until(self)

    def elapsed_time(self, end_event: SimMark) -> float:
        assert self.tick is not None and end_event.tick is not None, "timed before both were passed"
        return float(end_event.tick - self.tick)


class SimEngine:
    """A device whose copy and compute streams advance in turns, in any order that the marks allow.

    Copies go through raw pointers and keep nothing alive, as on a GPU; freed memory is reused at once, as by
    CUDA's caching allocator.

    Args:
        waits: False leaves out the copy stream's waits: a broken runtime, which the tests must catch.
    """

    def __init__(
        self, device: torch.device, *, seed: int = 0, can_pin: bool = False, waits: bool = True
    ) -> None:
        self.device = device
        self.can_pin = can_pin
        self._waits = waits
        self._random = random.Random(seed)
        self._copy_first = self._random.choice([0.02, 0.5, 0.98])
        self._idle_steps = [0, 0, 1, 1, 2, 8]
        self._lock = threading.RLock()
        self._queues: dict[str, deque[Callable[[], bool]]] = {"copy": deque(), "compute": deque()}
        self._tick = 0
        self._pool: list[torch.Tensor] = []
        self.threads: set[str] = set()

    @property
    def operations_run(self) -> int:
        return self._tick

    def lag(self, *, copy_first: float) -> None:
        """From now on nothing runs until somebody waits for it; copies come first with this probability."""
        self._idle_steps = [0]
        self._copy_first = copy_first

    def enter_thread(self) -> None:
        self.threads.add(threading.current_thread().name)

    def allocate(self, nbytes: int) -> torch.Tensor:
        memory = torch.full((nbytes,), 0xEE, dtype=torch.uint8)
        self._pool.append(memory)
        return memory

    def allocate_for_copy(self, nbytes: int) -> torch.Tensor:
        rounded = -(-nbytes // 512) * 512
        for memory in self._pool:
            unused = (
                torch._C._storage_Use_Count(memory.untyped_storage()._cdata) <= 2
            )  # the pool's, this call's
            if memory.numel() == rounded and unused:
                return memory[:nbytes]
        return self.allocate(rounded)[:nbytes]

    def stage(self, nbytes: int) -> torch.Tensor:
        return self.allocate(nbytes)

    def copy(self, destination: torch.Tensor, source: torch.Tensor) -> None:
        to, start, nbytes = destination.data_ptr(), source.data_ptr(), source.numel()
        self._put("copy", lambda: bool(ctypes.memmove(to, start, nbytes)) or True)

    def compute(self, kernel: Callable[[], None]) -> None:
        """Queues work on the compute stream."""

        def run() -> bool:
            kernel()
            return True

        self._put("compute", run)

    def mark_copy(self) -> SimMark:
        return self._mark("copy")

    def mark_compute(self) -> SimMark:
        return self._mark("compute")

    def _mark(self, stream: str) -> SimMark:
        mark = SimMark(self)

        def passed() -> bool:
            mark.tick = self._tick
            return True

        self._put(stream, passed)
        return mark

    def copy_after(self, mark: Any) -> None:
        if self._waits:
            self._put("copy", lambda: mark.tick is not None)

    def compute_after(self, mark: Any) -> None:
        self._put("compute", lambda: mark.tick is not None)

    def synchronize(self) -> None:
        with self._lock:
            while any(self._queues.values()):
                assert self._advance(), "the streams wait for each other"

    def run_until(self, mark: SimMark) -> None:
        with self._lock:
            while mark.tick is None:
                assert self._advance(), "the streams wait for each other"

    def _put(self, stream: str, operation: Callable[[], bool]) -> None:
        with self._lock:
            self._queues[stream].append(operation)
            for _ in range(self._random.choice(self._idle_steps)):
                self._advance()

    def _advance(self) -> bool:
        names = ["copy", "compute"] if self._random.random() < self._copy_first else ["compute", "copy"]
        for name in filter(self._queues.__getitem__, names):
            self._tick += 1
            if self._queues[name][0]():
                self._queues[name].popleft()
                return True
        return False
