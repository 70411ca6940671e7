"""A recorder without a GPU that treats memory as CUDA graphs do, only worse."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch.utils import _pytree as pytree

from squareq_fx import CompiledModule
from squareq_fx.lowering.lowered import lowered
from squareq_fx.recording.cuda_graphs import Recorder, copy_into, memory_like
from squareq_fx.recording.recorded import Recorded, recorded

__all__ = ["PoisonRecorder", "record", "recordings"]

_ALIGNMENT = 256
_POISON = 0xCD


R = TypeVar("R", bound=Recorder)


def record(module: CompiledModule, recorder: R, **options: Any) -> R:
    """From now on the module's graphs run recorded, its functions as they are: all of them in one pool."""
    for one in module.lowered():
        one._make, one._twin = (lambda gm: recorded(lowered(gm), recorder=recorder, **options)), None
    return recorder


def recordings(module: CompiledModule) -> list[Recorded]:
    """What runs the forward, and then the halves of a training step, of a module that went through `record`."""
    return [one.twin() for one in module.lowered()]  # type: ignore[misc]


class PoisonRecorder:
    """Records Python calls. Results keep their addresses; what is not live in the pool at a piece is overwritten when it runs.

    As with CUDA graphs, recording computes nothing, memory is free for the next piece when the last reference to it goes, and a
    graph keeps nothing of what it reads alive.

    Attributes:
        replays, graphs: how many replays there were, and how many graphs there are.
    """

    device = torch.device("cpu")

    def __init__(self, nbytes: int = 1 << 22) -> None:
        self._memory = torch.full((nbytes + _ALIGNMENT,), _POISON, dtype=torch.uint8)
        self._start = -self._memory.data_ptr() % _ALIGNMENT
        self._blocks: list[tuple[int, int, torch.UntypedStorage]] = []
        self._in_turn = False
        self.graphs: set[_Graph] = set()
        self.replays = self.peak = self.prepared = 0

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        assert not self._in_turn
        self._in_turn = True
        try:
            yield
        finally:
            self._in_turn = False

    def prepare(self) -> None:
        assert not self.live(), "a recording begins, and the last one has left something in the pool"
        self.prepared += 1

    def record(
        self, inputs: Sequence[Any], sources: Sequence[torch.Tensor], run: Callable[..., Any]
    ) -> tuple[list[torch.Tensor], Any, _Graph]:
        assert self._in_turn
        buffers = [self._like(memory_like(source)) for source in sources]
        copy_into(buffers, sources)
        found = run(inputs, buffers)
        given = [x.untyped_storage().data_ptr() for x in [*inputs, *buffers] if isinstance(x, torch.Tensor)]
        own: list[torch.Tensor] = []

        def placed(x: torch.Tensor) -> torch.Tensor:
            if x.untyped_storage().data_ptr() in given:
                return x
            own.append(self._like(x))
            return own[-1]

        results = pytree.tree_map_only(torch.Tensor, placed, found)
        for x in [*buffers, *own]:  # recording is not running
            self._fill(x)
        graph = _Graph(self, run, [*map(self.alias, inputs)], [*map(self.alias, buffers)], [*map(self.alias, own)], self.live())
        self.graphs.add(graph)
        return buffers, results, graph

    def alias(self, x: Any) -> Any:
        if not isinstance(x, torch.Tensor):
            return x
        whole = x.untyped_storage()
        return _on(_storage(whole.data_ptr(), whole.nbytes()), x, x.storage_offset())

    def release(self, graphs: Iterable[Any]) -> None:
        for graph in graphs:
            self.graphs.remove(graph)

    def nbytes(self) -> int | None:
        return self._memory.numel()

    def live(self) -> list[tuple[int, int]]:
        """Ranges of the pool that tensors are in."""
        self._blocks = [block for block in self._blocks if torch._C._storage_Use_Count(block[2]._cdata) > 1]
        return [(start, end) for start, end, _ in self._blocks]

    def poison(self, live: Iterable[tuple[int, int]]) -> None:
        at = self._start
        for start, end in [*sorted(live), (self._memory.numel(), 0)]:
            self._memory[at:start].fill_(_POISON)
            at = end

    def holds(self, x: torch.Tensor) -> bool:
        return 0 <= x.data_ptr() - self._memory.data_ptr() < self._memory.numel()

    def _like(self, x: torch.Tensor) -> torch.Tensor:
        if not x.numel():
            return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype)
        extent = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride()))
        nbytes = -(-extent * x.element_size() // _ALIGNMENT) * _ALIGNMENT
        start = self._start
        for taken, end in sorted(self.live()):
            if start + nbytes <= taken:
                break
            start = end
        assert start + nbytes <= self._memory.numel(), "the pool is too small for this test"
        storage = _storage(self._memory.data_ptr() + start, nbytes)
        self._blocks.append((start, start + nbytes, storage))
        self.peak = max(self.peak, sum(end - start for start, end, _ in self._blocks))
        return _on(storage, x, 0)

    def _fill(self, x: torch.Tensor) -> None:
        if x.numel():
            storage = x.untyped_storage()
            torch.empty(0, dtype=torch.uint8).set_(storage, 0, (storage.nbytes(),), (1,)).fill_(_POISON)


class _Graph:
    def __init__(self, recorder: PoisonRecorder, run: Any, inputs: Any, buffers: Any, own: Any, live: Any) -> None:
        self._recorder, self._run, self._inputs = recorder, run, inputs
        self._buffers, self._own, self._live = buffers, own, live

    def replay(self) -> None:
        assert self._recorder._in_turn and self in self._recorder.graphs
        self._recorder.replays += 1
        self._recorder.poison(self._live)
        found = self._run(self._inputs, self._buffers)
        given = {x.untyped_storage().data_ptr() for x in [*self._inputs, *self._buffers] if isinstance(x, torch.Tensor)}
        fresh = [x for x in pytree.tree_leaves(found) if isinstance(x, torch.Tensor)]
        fresh = [x for x in fresh if x.untyped_storage().data_ptr() not in given]
        for to, x in zip(self._own, fresh, strict=True):
            copy_into([to], [x])


def _storage(address: int, nbytes: int) -> torch.UntypedStorage:
    return torch._C._construct_storage_from_data_pointer(address, torch.device("cpu"), nbytes)


def _on(storage: torch.UntypedStorage, x: torch.Tensor, offset: int) -> torch.Tensor:
    return torch.empty(0, dtype=x.dtype).set_(storage, offset, x.shape, x.stride())
