"""Counters for kernels whose last program to arrive finishes a tile: zero between launches, one set for each stream."""

from __future__ import annotations

import torch

__all__ = ["COUNTERS", "counters"]

COUNTERS = 1024
"""Counters of one set."""
_SETS = 64
_HELD: dict[torch.device, tuple[torch.Tensor, dict[int, int]]] = {}


def counters(device: torch.device) -> torch.Tensor | None:
    """[COUNTERS] int32 zeros for the current stream; the kernel leaves them zero. None where there are none to be had.

    All sets of a device are made at once, at its first launch that is not being captured: what a CUDA graph fills with zeros
    is not zero before that graph runs, and another one may run first. Launches on one stream follow each other, so they share
    a set; graphs captured on one stream do too, and must not run at the same time.
    """
    if device not in _HELD:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return None
        _HELD[device] = torch.zeros(_SETS, COUNTERS, dtype=torch.int32, device=device), {}
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()  # other streams read them too
    sets, taken = _HELD[device]
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    if stream not in taken and len(taken) < _SETS:
        taken[stream] = len(taken)
    return sets[taken[stream]] if stream in taken else None
