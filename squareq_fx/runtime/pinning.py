"""Host memory registered with CUDA: one call per mapping, shared by every model that reads from it.

torch's own pinned allocator rounds each allocation up to a power of two; a registered range costs what it
holds.
"""

from __future__ import annotations

import threading
import warnings
from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["pin", "unpin"]


@dataclass
class _Range:
    owner: torch.Tensor  # keeps the memory mapped for as long as it is registered
    users: int


_ranges: dict[tuple[int, int], _Range] = {}
# Re-entrant: a garbage-collected runtime may unpin while this thread is in here.
_lock = threading.RLock()


def pin(memory: torch.Tensor) -> str | None:
    """Registers the bytes of a contiguous CPU tensor, or counts one more user of the same range.

    Args:
        memory: a contiguous CPU tensor. About 3 GB/s the first time.

    Returns:
        None if the range is registered now (give it back with `unpin`), else why it is not (CUDA's message).
    """
    key = _key(memory)
    if not key[1]:
        return None
    with _lock:
        known = _ranges.get(key)
        if known is not None:
            known.users += 1
            return None
        cudart = _cudart()
        code = cudart.cudaHostRegister(key[0], key[1], 0)
        if int(code) != 0:
            _forget_last_error()
            return str(cudart.cudaGetErrorString(code))
        _ranges[key] = _Range(memory, users=1)
        return None


def unpin(memory: torch.Tensor) -> None:
    """Takes back one `pin`; the last one unregisters. No copy from the range may be in flight by then."""
    key = _key(memory)
    with _lock:
        known = _ranges.get(key)
        if known is None:
            return
        known.users -= 1
        if known.users:
            return
        del _ranges[key]
        cudart = _cudart()
        code = cudart.cudaHostUnregister(key[0])
        if int(code) != 0:
            _forget_last_error()
            reason = cudart.cudaGetErrorString(code)
            warnings.warn(f"CUDA did not unregister {key[1]} bytes of host memory: {reason}", stacklevel=2)


def _key(memory: torch.Tensor) -> tuple[int, int]:
    return memory.data_ptr(), memory.numel() * memory.element_size()


def _cudart() -> Any:
    return torch.cuda.cudart()


def _forget_last_error() -> None:
    """A refused registration stays CUDA's "last error", and the next kernel launch would be blamed for it."""
    try:
        torch.empty(1, device="cuda").fill_(1.0)
    except RuntimeError:
        return  # that was it: torch clears the error as it reports it
