"""Work of a CUDA device recorded once and started again with one call: graphs, and the memory they lie in."""

from __future__ import annotations

import contextlib
import gc
import threading
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

import torch

from squareq_fx.errors import RuntimeStateError, SquareQError

__all__ = ["CudaRecorder", "Graph", "Recorder", "check_device", "copy_into", "memory_like"]

_CAPTURE = threading.Lock()  # torch can capture one graph at a time in a process

Run = Callable[[Sequence[Any], Sequence[torch.Tensor]], Any]


class Graph(Protocol):
    """Recorded work, in the terms of `torch.cuda.CUDAGraph`."""

    def replay(self) -> None:
        """Does the work again on the current stream, in the memory it was recorded with."""


class Recorder(Protocol):
    """A device that records, and one pool of memory for all it records.

    Recordings share the pool: what one leaves there another may overwrite. So nothing in it is read again after the `turn` in
    which it was written, and turns follow each other, on the device too.
    """

    device: torch.device

    def turn(self) -> contextlib.AbstractContextManager[None]:
        """In it the pool is the caller's.

        Raises:
            RuntimeStateError: another thread is in a turn, or this one is already.
        """

    def prepare(self) -> None:
        """Before the first `record` of several."""

    def record(
        self, inputs: Sequence[Any], sources: Sequence[torch.Tensor], run: Run
    ) -> tuple[Sequence[torch.Tensor], Any, Graph]:
        """Records `run(inputs, buffers)`; it must not be relied on to have run.

        Args:
            inputs: what stays where it is: earlier results, weights, numbers.
            sources: each gets a buffer in the pool, of its sizes and strides, to be filled before each replay.

        Returns:
            the buffers; what `run` returned, to be valid after a replay; the graph. Their memory is free for later records as
            soon as the last reference to a tensor in it goes.
        """

    def alias(self, x: torch.Tensor) -> torch.Tensor:
        """The same memory, which the result does not keep from being used again."""

    def release(self, graphs: Iterable[Graph]) -> None:
        """Waits for the device, and frees graphs; with the last one, the pool."""

    def nbytes(self) -> int | None:
        """What the pool takes of the device; None if that is not known."""


def check_device(device: torch.device | str, backend: str = "cudagraph") -> None:
    """Raises SquareQError unless it is a device that can record graphs; to be asked before a long compilation."""
    if torch.device(device).type != "cuda":
        raise SquareQError(
            f'backend="{backend}" records graphs of a CUDA device and cannot run on {device}. Compile with '
            'backend="inductor" or backend="eager", or with device="cuda".'
        )


class CudaRecorder:
    """A `Recorder` of one CUDA device. Starts CUDA with its first turn.

    Raises:
        SquareQError: the device is not a CUDA device.
    """

    def __init__(self, device: torch.device | str) -> None:
        check_device(device)
        self.device = torch.device(device)
        self._turn = threading.Lock()
        self._stream: torch.cuda.Stream | None = None
        self._done: torch.cuda.Event | None = None
        self._pool: Any = None
        self._graphs: weakref.WeakSet[torch.cuda.CUDAGraph] = weakref.WeakSet()

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        if not self._turn.acquire(blocking=False):
            raise RuntimeStateError("these recordings are in use already; give each concurrent module its own")
        try:
            if self.device.index is None:
                self.device = torch.device("cuda", torch.cuda.current_device())
            # Two calls may come on two streams; the second must not write where the first still reads.
            if self._done is not None:
                torch.cuda.current_stream(self.device).wait_event(self._done)
            try:
                yield
            finally:
                self._done = torch.cuda.current_stream(self.device).record_event(self._done)
        finally:
            self._turn.release()

    def prepare(self) -> None:
        # While it records, torch's allocator cannot give back what it has cached, so the pool could not grow into that.
        gc.collect()
        torch.cuda.synchronize(self.device)
        torch.cuda.empty_cache()

    def record(
        self, inputs: Sequence[Any], sources: Sequence[torch.Tensor], run: Run
    ) -> tuple[Sequence[torch.Tensor], Any, Graph]:
        if self._stream is None:
            self._stream = torch.cuda.Stream(self.device)
        if not self._graphs:  # the pool of graphs that are all gone cannot be used again
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with _CAPTURE, torch.cuda.device(self.device), _undisturbed(), torch.cuda.stream(self._stream):
            # Other threads read weights from disk meanwhile, and may do what a recording thread may not.
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                with _unfilled():  # or a replay would fill what has been copied there
                    buffers = [memory_like(source) for source in sources]
                results = run(inputs, buffers)
            except BaseException:
                self._abandon(graph)
                raise
            graph.capture_end()
        self._graphs.add(graph)
        return buffers, results, graph

    def alias(self, x: torch.Tensor) -> torch.Tensor:
        whole = x.untyped_storage()
        storage = torch._C._construct_storage_from_data_pointer(whole.data_ptr(), x.device, whole.nbytes())
        return torch.empty(0, dtype=x.dtype, device=x.device).set_(storage, x.storage_offset(), x.size(), x.stride())

    def release(self, graphs: Iterable[Graph]) -> None:
        torch.cuda.synchronize(self.device)
        for graph in graphs:
            assert isinstance(graph, torch.cuda.CUDAGraph)
            self._graphs.discard(graph)
            graph.reset()
        torch.cuda.empty_cache()

    def nbytes(self) -> int | None:
        if not self._graphs:
            return 0
        segments = torch.cuda.memory_snapshot()
        if not all("segment_pool_id" in segment for segment in segments):
            return None
        return sum(s["total_size"] for s in segments if tuple(s["segment_pool_id"]) == tuple(self._pool))

    def _abandon(self, graph: torch.cuda.CUDAGraph) -> None:
        """Ends a recording that failed. Neither stream nor allocator may stay in it, for the caller may go on without."""
        with contextlib.suppress(RuntimeError):
            graph.capture_end()
        with contextlib.suppress(RuntimeError):
            torch._C._cuda_endAllocateToPool(self.device.index, self._pool)
        # The generator takes itself to be in a recording until that ends well; a copy of its state does not.
        generator = torch.cuda.default_generators[self.device.index]
        generator.graphsafe_set_state(generator.clone_state())


def memory_like(x: torch.Tensor) -> torch.Tensor:
    """Uninitialised memory for a copy of x, of its sizes, dtype and device.

    The strides are x's too, and sizes of stride 0 take memory once; but where elements overlap otherwise it is contiguous.
    """
    if x.is_contiguous():  # nearly always; what follows takes some microseconds, and a step may have a thousand tensors
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)
    if _overlaps(x):
        return torch.empty(x.shape, dtype=x.dtype, device=x.device)
    return torch.empty_strided(_once(x), x.stride(), dtype=x.dtype, device=x.device).expand(x.shape)


def copy_into(targets: Sequence[torch.Tensor], sources: Sequence[torch.Tensor]) -> None:
    """Fills each of `targets`, which `memory_like` made for the source, by a few kernels."""
    pairs = [(t, s) for t, s in zip(targets, sources) if s.numel()]
    if pairs:
        pairs = [pair if pair[0].is_contiguous() else _written_once(*pair) for pair in pairs]
        torch._foreach_copy_([_signed(t) for t, _ in pairs], [_signed(s) for _, s in pairs])


def _written_once(target: torch.Tensor, source: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return _dense(target), _dense(source) if _is_expanded(target) else source


_SIGNED = {torch.uint16: torch.int16, torch.uint32: torch.int32, torch.uint64: torch.int64}


def _signed(x: torch.Tensor) -> torch.Tensor:
    """The same bytes in a type that torch's kernels know: attention keeps its seed as uint64."""
    return x.view(_SIGNED[x.dtype]) if x.dtype in _SIGNED else x


def _dense(x: torch.Tensor) -> torch.Tensor:
    return x.as_strided(_once(x), x.stride(), x.storage_offset()) if _is_expanded(x) else x


def _once(x: torch.Tensor) -> list[int]:
    return [min(size, 1) if stride == 0 else size for size, stride in zip(x.shape, x.stride())]


def _is_expanded(x: torch.Tensor) -> bool:
    return any(stride == 0 and size > 1 for size, stride in zip(x.shape, x.stride()))


def _overlaps(x: torch.Tensor) -> bool:
    """May two elements lie at one address, other than by a stride of 0?"""
    span = 0
    for stride, size in sorted((stride, size) for stride, size in zip(x.stride(), x.shape) if size > 1 and stride):
        if stride <= span:
            return True
        span += stride * (size - 1)
    return False


@contextlib.contextmanager
def _unfilled() -> Iterator[None]:
    """Fresh memory stays as it is, also where torch fills it with NaN to be deterministic."""
    settings: Any = torch.utils.deterministic
    fills, settings.fill_uninitialized_memory = settings.fill_uninitialized_memory, False
    try:
        yield
    finally:
        settings.fill_uninitialized_memory = fills


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """No garbage collection, whose finalizers may call CUDA; a workspace of cuBLAS of this recording's own; and no warning
    about a piece that starts no kernel."""
    collects = gc.isenabled()
    gc.disable()
    torch._C._cuda_clearCublasWorkspaces()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*CUDA Graph is empty.*")
            yield
    finally:
        torch._C._cuda_clearCublasWorkspaces()
        if collects:
            gc.enable()
