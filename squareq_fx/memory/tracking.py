"""Which bytes of a device tensors hold, operation by operation: of real tensors and of fake ones alike."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

__all__ = ["AllocationTracker", "Operation", "tensors_in"]

Operation = tuple[Any, tuple[Any, ...], dict[str, Any]]
"""The operator, its positional arguments, its keywords."""

_GRANULE = 512
"""Bytes to a multiple of which torch's CUDA allocator rounds a request up."""


class AllocationTracker(TorchDispatchMode):
    """Counts the storages that operations make on one device while the mode is on, and that are still held.

    A storage counts from the operation that returns it until its last tensor goes, whoever holds that; views are free. What was
    there before does not count.

    Args:
        device: whose memory.
        allocates: whether the result of an operation is memory taken for it; default: always.
        transient: bytes that an operation takes besides, for its own work, and gives back; default: none.

    Attributes:
        held: bytes now.
        peak: most bytes at a time, since the mode or the current `span` began.
        place: what is running, set by whoever runs it.
        peak_place: what `place` was when the peak was reached.
    """

    def __init__(
        self,
        device: torch.device,
        allocates: Callable[[Operation], bool] = lambda _: True,
        transient: Callable[[Operation], int] = lambda _: 0,
    ) -> None:
        super().__init__()
        self.held = self.peak = 0
        self.place: Any = None
        self.peak_place: Any = None
        self._device = device.type
        self._granule = _GRANULE if device.type == "cuda" else 1
        self._allocates = allocates
        self._transient = transient
        self._known: WeakIdKeyDictionary = WeakIdKeyDictionary()  # storage to the bytes it counts for

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        operation: Operation = (func, args, kwargs or {})
        for tensor in tensors_in(operation[1:]):
            self._known.setdefault(tensor.untyped_storage(), 0)
        result = func(*args, **operation[2])
        takes = self._allocates(operation)
        for tensor in tensors_in(result):
            if tensor.untyped_storage() not in self._known:
                self._take(tensor, takes)
        self.reach(self.held + self._transient(operation), self.place)
        return result

    @contextmanager
    def span(self) -> Iterator[None]:
        """While it lasts `peak` is its own; afterwards it is the larger one again."""
        before = self.peak, self.peak_place
        self.peak, self.peak_place = self.held, self.place
        try:
            yield
        finally:
            if before[0] >= self.peak:
                self.peak, self.peak_place = before

    @contextmanager
    def uncounted(self) -> Iterator[None]:
        """What operations make while it lasts does not count."""
        before, self._allocates = self._allocates, lambda _: False
        try:
            yield
        finally:
            self._allocates = before

    def reach(self, held: int, place: Any) -> None:
        """At `place` so many bytes are held; called for what happens out of this mode's sight."""
        if held > self.peak:
            self.peak, self.peak_place = held, place

    def bytes_of(self, tensor: torch.Tensor) -> int:
        """What the tensor's storage counts for: 0 if it was there before, or was not allocated for it."""
        return self._known.get(tensor.untyped_storage(), 0)

    def _take(self, tensor: torch.Tensor, takes: bool) -> None:
        storage = tensor.untyped_storage()
        nbytes = 0
        if takes and tensor.device.type == self._device:
            nbytes = -(-storage.nbytes() // self._granule) * self._granule
        self._known[storage] = nbytes
        self.held += nbytes
        if nbytes:
            weakref.finalize(storage, self._give_back, nbytes)

    def _give_back(self, nbytes: int) -> None:
        self.held -= nbytes


def tensors_in(values: Any) -> Iterator[torch.Tensor]:
    """The tensors of any nest of containers."""
    return (leaf for leaf in pytree.tree_leaves(values) if isinstance(leaf, torch.Tensor))
