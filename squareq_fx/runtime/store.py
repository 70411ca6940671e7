"""Where the segments' bytes are on the host, and how they are reached: verified, packed, pinned."""

from __future__ import annotations

import difflib
import mmap
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Literal, get_args

import torch

from squareq_fx.errors import RuntimeStateError
from squareq_fx.runtime.pinning import pin, unpin
from squareq_fx.runtime.segments import Segment, packed_offsets

__all__ = ["Backing", "WeightStore"]

_CHECKERS = 4
Backing = Literal["resident", "host", "disk"]


class WeightStore:
    """The host side of streaming. Several runtimes may use one store; several stores may share one `data`.

    Args:
        data: uint8 [n] on the CPU, contiguous, usually the mapping of a slab's data section.
        segments: everything that can be loaded, with distinct names.
        backing: "resident": all segments are copied to the device once. "host": `data` is registered as one
            pinned range, assembled segments are packed once into a second. "disk": `data` stays an unpinned
            mapping that a reader thread copies from. On the CPU "host" is plain memory.
        keep_resident: segments that stay on the device in the other two backings.
        verify: called with a segment's name once, before its bytes are first used, perhaps on another thread
            and beside other calls; it raises if they are wrong, and is then asked again the next time.

    Raises:
        RuntimeStateError: `data` of another kind, a piece beyond its end, two segments of one name, an
            unknown backing, a `keep_resident` that does not exist.
    """

    def __init__(
        self,
        data: torch.Tensor,
        segments: Iterable[Segment],
        *,
        backing: Backing = "host",
        keep_resident: Iterable[str] = (),
        verify: Callable[[str], None] | None = None,
    ) -> None:
        if (data.dtype, data.dim(), data.device.type) != (torch.uint8, 1, "cpu") or not data.is_contiguous():
            found = f"{data.dtype} {list(data.shape)} with strides {data.stride()} on {data.device}"
            raise RuntimeStateError(f"a store's data is a contiguous uint8 [n] on the CPU, not {found}")
        if backing not in get_args(Backing):
            raise RuntimeStateError(f"backing {backing!r} is none of {', '.join(get_args(Backing))}")
        self.data = data
        self.backing = backing
        self.segments: Mapping[str, Segment] = _by_name(segments, data.numel())
        wanted = tuple(self.segments) if backing == "resident" else tuple(keep_resident)
        self.resident: tuple[str, ...] = tuple(dict.fromkeys(self.segment(name).name for name in wanted))
        self.streamed: tuple[str, ...] = tuple(n for n in self.segments if n not in self.resident)
        self._verify = verify
        self._verified: set[str] = set()
        self._verify_locks = {name: threading.RLock() for name in self.segments}
        assembled = [name for name in self.streamed if self.segments[name].data_offset is None]
        self._packed_offsets, self._packed_bytes = packed_offsets(self.segments[name] for name in assembled)
        self._packed: torch.Tensor | None = None
        self._in_packed: set[str] = set()
        self._pin_lock = threading.RLock()
        self._pin_users = 0

    def segment(self, name: str) -> Segment:
        """Raises RuntimeStateError if there is none of that name, with near ones."""
        found = self.segments.get(name)
        if found is None:
            near = difflib.get_close_matches(name, self.segments, n=3) or list(self.segments)[:3]
            raise RuntimeStateError(f"no segment is called {name!r}; there are {', '.join(near) or 'none'}")
        return found

    def check(self, name: str) -> None:
        """Verifies a segment unless that has been done. Raises what the `verify` callable raises."""
        if name in self._verified:
            return
        with self._verify_locks[self.segment(name).name]:
            if name not in self._verified:
                if self._verify is not None:
                    self._verify(name)
                self._verified.add(name)

    @contextmanager
    def checking(self, names: Iterable[str]) -> Iterator[None]:
        """Inside, threads check these segments, in this order; those not begun at the end are left. What they find wrong is
        found again, and raised, by the `check` that needs it.
        """
        if self._verify is None:
            yield
            return
        pool = ThreadPoolExecutor(_CHECKERS, "squareq-check")
        try:
            for name in names:
                try:
                    pool.submit(self.check, name)
                except RuntimeError:  # no more threads, or Python is ending: it goes without
                    break
            yield
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def gather(self, name: str, destination: torch.Tensor, start: int = 0) -> None:
        """Copies the segment's bytes from `start` on into `destination`, uint8 [n] on any device."""
        end = start + destination.numel()
        for piece in self.segment(name).pieces:
            first, last = max(start, piece.flat_offset), min(end, piece.flat_offset + piece.nbytes)
            if first >= last:
                continue
            skip = first - piece.flat_offset
            if isinstance(piece.source, torch.Tensor):
                source = piece.source[skip : skip + last - first]
            else:
                source = self.data[piece.source + skip : piece.source + skip + last - first]
            destination[first - start : last - start].copy_(source)

    def host_view(self, name: str) -> torch.Tensor:
        """The segment as one flat uint8 [nbytes], verified: a view of `data`, or packed on the first call."""
        self.check(name)
        segment = self.segment(name)
        if segment.data_offset is not None:
            return self.data[segment.data_offset : segment.data_offset + segment.nbytes]
        offset = self._packed_offsets[name]
        with self._pin_lock:
            view = self._packed_buffer()[offset : offset + segment.nbytes]
            if name not in self._in_packed:
                self.gather(name, view)
                self._in_packed.add(name)
        return view

    def pin(self) -> bool:
        """Registers all host memory that streamed copies read from. Each True is given back with `unpin`.

        Returns:
            False, with a warning, if CUDA refuses (a limit on locked memory).
        """
        with self._pin_lock:
            self._pin_users += 1
            if self._pin_users > 1:
                return True
            done: list[torch.Tensor] = []
            for memory in self._pinnable():
                reason = pin(memory)
                if reason is not None:
                    for other in done:
                        unpin(other)
                    self._pin_users = 0
                    warnings.warn(
                        f"{memory.numel()} bytes of weights could not be pinned ({reason}); they are copied "
                        "through a pinned staging ring, which is slower. Raise the limit on locked memory "
                        "(ulimit -l).",
                        RuntimeWarning,
                        stacklevel=2,
                    )
                    return False
                done.append(memory)
            return True

    def unpin(self) -> None:
        """Takes back one `pin` that returned True."""
        with self._pin_lock:
            self._pin_users -= 1
            if self._pin_users == 0:
                for memory in self._pinnable():
                    unpin(memory)

    def host_bytes(self) -> int:
        """Host memory the store holds beyond the file's page cache: pinned ranges and packed segments."""
        packed = 0 if self._packed is None else self._packed.numel()
        return packed + (self.data.numel() if self._pin_users and self._reads_data() else 0)

    def _reads_data(self) -> bool:
        return any(self.segments[name].data_offset is not None for name in self.streamed)

    def _pinnable(self) -> list[torch.Tensor]:
        ranges = [self.data] if self._reads_data() else []
        return [*ranges, self._packed_buffer()] if self._packed_bytes else ranges

    def _packed_buffer(self) -> torch.Tensor:
        if self._packed is None:
            # An anonymous mapping owns whole pages, so registering it cannot touch a neighbour's.
            self._packed = torch.frombuffer(mmap.mmap(-1, max(1, self._packed_bytes)), dtype=torch.uint8)
        return self._packed


def _by_name(segments: Iterable[Segment], data_bytes: int) -> dict[str, Segment]:
    named: dict[str, Segment] = {}
    for segment in segments:
        if segment.name in named:
            raise RuntimeStateError(f"two segments are called {segment.name!r}")
        for piece in segment.pieces:
            if isinstance(piece.source, int) and piece.source + piece.nbytes > data_bytes:
                raise RuntimeStateError(
                    f"segment {segment.name!r} reads {piece.nbytes} bytes from {piece.source} on, of data "
                    f"that holds {data_bytes}"
                )
        named[segment.name] = segment
    return named
