"""The checksum of a tensor's bytes."""

from __future__ import annotations

import torch
import xxhash

__all__ = ["checksum", "raw_bytes"]


def raw_bytes(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor, without a copy."""
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


def checksum(tensor: torch.Tensor) -> str:
    """xxh3_64 of a contiguous CPU tensor's bytes, 16 hex digits."""
    return xxhash.xxh3_64(raw_bytes(tensor)).hexdigest()
